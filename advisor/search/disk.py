"""What a search writes to disk, predicted before it starts and held to a limit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.calibration.passes import free_bytes
from advisor.calibration.settings import dtype_bytes
from advisor.calibration.sources import open_statistics, predicted_bytes
from advisor.errors import InputError
from advisor.evaluation.reference import Reference, reference_bytes
from advisor.plan.folders import cache_root
from advisor.predict.explain import size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.calibration.mixing import Statistics
    from advisor.modelspec.outer import OuterModule
    from advisor.search.planning import Task

_CODE_BYTES = 1.35
"""Bytes of a quantized weight on disk: a code, and scales and zero points of groups of 16."""
_KEPT_CANDIDATES = 2
"""Earlier finalists whose codes are kept, at their largest."""
_KEPT_SHARE = 0.5
"""Codes are kept where the search then takes at most this share of the room there is."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes that a search adds to the disk.

    Attributes:
        collecting: While statistics are collected, at its peak; 0 where they are there already.
        statistics: What is left of that.
        references: The unquantized model's predictions of the texts that are measured first.
        candidate: A finalist while it is measured; nothing is left of it.
        kept: Codes of earlier finalists, until the search ends.
        outside: Checkpoints that other libraries make.
        limit: The most that is allowed; None for what is free.
        compact: Whether statistics are kept in 16 bits, as there is no room for more.
    """

    collecting: int
    statistics: int
    references: int
    candidate: int
    kept: int = 0
    outside: int = 0
    limit: int | None = None
    compact: bool = False

    @property
    def peak(self) -> int:
        """The most that is there at once."""
        later = self.references + self.candidate + self.kept + self.outside
        return max(self.collecting, self.statistics + later)

    @property
    def left_for_references(self) -> int | None:
        """Bytes that all references together may take; None for no limit."""
        if self.limit is None:
            return None
        return self.limit - self.statistics - self.candidate - self.kept - self.outside

    def describe(self) -> str:
        """Say it in a line."""
        theirs = f", {size(self.outside)} of them other libraries'" if self.outside else ""
        return (
            f"at most {size(self.peak)}: {size(self.collecting)} while collecting, then "
            f"{size(self.statistics)} of statistics"
            f"{' (in 16 bits, for lack of room)' if self.compact else ''}, "
            f"{size(self.references)} of reference and "
            f"{size(self.candidate + self.kept + self.outside)} for candidates{theirs}"
        )


def predict_disk(
    task: Task,
    store: Statistics,
    limit: int | None = None,
    ends: Sequence[OuterModule] = (),
    outside: int = 0,
) -> DiskUse:
    """Return what a search will write, what is on disk already left out.

    Args:
        task: What is asked.
        store: Of its statistics.
        limit: The most that is allowed.
        ends: Embedding and head, where candidates quantize them.
        outside: Bytes of the checkpoints that other libraries will make.
    """
    loaded = task.loaded
    config: Any = loaded.model.config
    tokens = task.calibration.tokens.numel()
    collecting, kept = predicted_bytes(loaded, task.calibration, store)
    references = 0
    for text in task.judges.texts.values():
        part = task.judges.part(text, 1)
        if part is not None and not Reference.exists(loaded, part, cache_root()):
            references += reference_bytes(part, int(config.vocab_size))
    states = 2 * tokens * int(config.hidden_size) * dtype_bytes(str(loaded.dtype)[6:])
    weights = task.spec.quantizable_parameters + sum(m.linear.parameters for m in ends)
    codes = int(_CODE_BYTES * weights)
    use = DiskUse(collecting, kept, references, codes + states, 0, outside, limit, store.compact)
    # Codes are kept where there is room beside all the rest: they save work and nothing else.
    room = free_bytes(cache_root()) if limit is None else limit
    with_kept = replace(use, kept=_KEPT_CANDIDATES * codes)
    return with_kept if with_kept.peak <= _KEPT_SHARE * room else use


def open_what_fits(
    task: Task, limit: int | None = None, ends: Sequence[OuterModule] = (), outside: int = 0
) -> tuple[Statistics, DiskUse]:
    """Return the statistics of a search and what it writes to disk.

    Where there is no room for the usual ones, they are compact: half of the bytes a moment, and
    moments of fewer parts of the text. Arguments as of :func:`predict_disk`.
    """
    store = open_statistics(task.loaded, task.calibration)
    use = predict_disk(task, store, limit, ends, outside)
    room = free_bytes(cache_root()) if limit is None else min(limit, free_bytes(cache_root()))
    if store.complete or use.peak <= room:
        return store, use
    store = open_statistics(task.loaded, task.calibration, compact=True)
    return store, predict_disk(task, store, limit, ends, outside)


def check_disk(use: DiskUse) -> None:
    """Refuse, before any work, a search that the disk or the limit has no room for.

    Raises:
        InputError: It says what is needed, and for what.
    """
    root = cache_root()
    _logger.info("disk use under %s: %s", root, use.describe())
    advice = "Use fewer --samples or --evaluation-sequences, or shorter ones"
    if use.outside:
        advice += ", or fewer --backends"
    if use.limit is not None and use.peak > use.limit:
        raise InputError(
            f"this search needs {use.describe()}; --max-disk allows {size(use.limit)}. {advice}."
        )
    free = free_bytes(root)
    if use.peak > free:
        raise InputError(
            f"this search needs {use.describe()}; {size(free)} are free under {root}. "
            f"{advice}, or set ADVISOR_CACHE to a folder on another disk."
        )
