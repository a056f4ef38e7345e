"""Statistics collected in parts, by several processes or machines, merged into those of the whole.

Each process collects a run of consecutive sequences (:func:`collect_part`); whoever has all their
stores under one root merges them (:func:`merge_parts`) into the store that one process would have
filled, under the same key. Input sums that no part divides have the same bits; sums over several
parts, and the gradients', are added in another order and differ by float32 rounding. What tokens
send back is the same, as it is drawn by what a sequence holds.

Memory holds one block's sums.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.settings import collection_settings
from advisor.calibration.store import gradients_file, inputs_file
from advisor.errors import InputError, join_errors
from advisor.models.inspect import outer_specs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.passes import Progress
    from advisor.calibration.settings import CollectionSettings
    from advisor.calibration.store import StatisticsStore
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

_MAXIMUM = "/maximum"
_WEIGHTS = "/weights"


def collect_part(
    loaded: LoadedModel,
    sequences: TokenSequences,
    start: int,
    stop: int,
    *,
    root: Path | None = None,
    gradient: str = "full",
    prefixes: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    max_bytes: int | None = None,
) -> StatisticsStore:
    """Collect the statistics of a part of some sequences, for :func:`merge_parts`.

    Args:
        loaded: The unquantized model.
        sequences: All sequences, of which this process takes some.
        start: Place of its first.
        stop: Place after its last.
        root: Folder of the cache.
        gradient: Of the whole, see :class:`advisor.calibration.settings.CollectionSettings`.
        prefixes: Of the whole.
        seed: Of the signs that outputs send back.
        progress: Called with (steps done, steps in all).
        max_bytes: Refuse to start when more disk than this is needed.

    Raises:
        InputError: There are no such sequences, not enough disk, or a setting breaks its rule.
    """
    if not 0 <= start < stop <= sequences.sequences:
        raise InputError(
            f"a part must lie within {sequences.sequences} sequences, but got {start} to {stop}."
        )
    whole = collection_settings(loaded, sequences, gradient=gradient, prefixes=prefixes, seed=seed)
    part, own = sequences.part(start, stop), _own_prefixes(whole, start, stop)
    store = open_store(loaded, part, root=root, gradient=gradient, prefixes=own, seed=seed)
    collect_statistics(
        loaded, part, store, gradient=gradient, prefixes=own, seed=seed,
        progress=progress, max_bytes=max_bytes,
    )  # fmt: skip
    return store


def merge_parts(
    loaded: LoadedModel,
    sequences: TokenSequences,
    cuts: Sequence[int],
    *,
    root: Path | None = None,
    gradient: str = "full",
    prefixes: Sequence[int] | None = None,
    seed: int = 0,
) -> StatisticsStore:
    """Merge the statistics of parts into those of all sequences.

    Args:
        loaded: The unquantized model.
        sequences: All sequences.
        cuts: Places where one part ends and the next begins, ascending: ``[16]`` for two parts.
        root: Folder of the cache that the parts were collected in.
        gradient: As the parts were collected.
        prefixes: As the parts were collected.
        seed: As the parts were collected.

    Returns:
        The complete store of all sequences; where it was complete already, as it was.

    Raises:
        InputError: Parts are missing or not complete (all are named).
        AdvisorError: A part is damaged.
    """
    whole = collection_settings(loaded, sequences, gradient=gradient, prefixes=prefixes, seed=seed)
    target = open_store(
        loaded, sequences, root=root, gradient=gradient, prefixes=prefixes, seed=seed
    )
    edges = [0, *cuts, sequences.sequences]
    parts: list[tuple[int, StatisticsStore]] = []
    problems = []
    for start, stop in itertools.pairwise(edges):
        store = open_store(
            loaded, sequences.part(start, stop), root=root, gradient=gradient,
            prefixes=_own_prefixes(whole, start, stop), seed=seed,
        )  # fmt: skip
        parts.append((start, store))
        if not store.complete:
            problems.append(
                f"there are no complete statistics of sequences {start} to {stop} under "
                f"{store.root}: collect that part first."
            )
    if target.complete:
        return target
    if problems:
        raise InputError(join_errors(problems))
    with target.lock():
        if not target.complete:
            _merge(loaded, sequences, whole, parts, target)
    return target


def _own_prefixes(whole: CollectionSettings, start: int, stop: int) -> list[int]:
    """Return the prefixes of a part whose ends are those of the whole that lie in it."""
    return [*(count - start for count in whole.prefixes if start < count < stop), stop - start]


def _merge(
    loaded: LoadedModel,
    sequences: TokenSequences,
    whole: CollectionSettings,
    parts: Sequence[tuple[int, StatisticsStore]],
    target: StatisticsStore,
) -> None:
    """Add the parts' sums, block by block; a killed merge goes on where it was."""
    target.begin(whole.facts(sequences.sequence_length))
    blocks = {linear.block for linear in loaded.linears}
    if whole.gradient != "none":
        outer = outer_specs(loaded.model)
        first = parts[0][1]
        blocks |= {spec.block for spec in outer if first.has(gradients_file(spec.block))}
    for block in sorted(blocks):
        names = [inputs_file(block)]
        if whole.gradient != "none":
            names.append(gradients_file(block))
        for name in names:
            if not target.has(name):
                target.put(name, _sums(name, whole, parts))
    target.finish()


def _sums(
    file: str, whole: CollectionSettings, parts: Sequence[tuple[int, StatisticsStore]]
) -> dict[str, Tensor]:
    """Return a file's sums over all parts.

    Those of a step from one prefix to the next (``<step>/...``) go to the step of the whole that
    the part's lies in.
    """
    sums: dict[str, Tensor] = {}
    for start, store in parts:
        # A part's steps end where the whole's do, so each lies in one of those.
        becomes = [
            next(step for step, end in enumerate(whole.prefixes) if start + count <= end)
            for count in store.prefixes
        ]
        with safe_open(str(store.verified(file)), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                first, _, rest = name.partition("/")
                key = f"{becomes[int(first)]}/{rest}" if first.isdecimal() else name
                value = handle.get_tensor(name)
                sums[key] = _joined(key, sums[key], value) if key in sums else value.clone()
    return sums


def _joined(name: str, before: Tensor, more: Tensor) -> Tensor:
    """Return what two parts have together: the maximum, every token's weight, or the sum."""
    if name.endswith(_MAXIMUM):
        return before.maximum(more)
    if name.endswith(_WEIGHTS):
        return torch.cat([before, more])
    return before + more
