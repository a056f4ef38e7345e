"""One calibration pass that every candidate is scored from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.calibration.passes import Collector, Progress
from advisor.calibration.settings import collection_settings
from advisor.calibration.store import StatisticsStore, statistics_key
from advisor.models.device import repeatable
from advisor.models.inspect import embedded_tokens
from advisor.plan.folders import cache_root

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel


def open_store(
    loaded: LoadedModel,
    sequences: TokenSequences,
    *,
    root: Path | None = None,
    gradient: str = "full",
    prefixes: Sequence[int] | None = None,
    seed: int = 0,
    compact: bool = False,
) -> StatisticsStore:
    """Return the store of a model's statistics over some sequences, complete or not yet.

    Args:
        loaded: The unquantized model.
        sequences: The calibration sequences.
        root: Folder of the cache; the default is :func:`advisor.plan.folders.cache_root`.
        gradient: See :class:`CollectionSettings`.
        prefixes: Sample counts whose sums are kept; by default 8, 16, 32, ...
        seed: Seed of the signs that outputs send back.
        compact: Whether the room is short: see :class:`CollectionSettings`.
    """
    settings = collection_settings(
        loaded, sequences, gradient=gradient, prefixes=prefixes, seed=seed, compact=compact,
    )  # fmt: skip
    key = statistics_key(loaded.fingerprint, sequences.sha256, settings.to_dict())
    return StatisticsStore(root or cache_root(), key, loaded.device, compact=compact)


def collect_statistics(
    loaded: LoadedModel,
    sequences: TokenSequences,
    store: StatisticsStore,
    *,
    gradients: bool = True,
    gradient: str = "full",
    prefixes: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    max_bytes: int | None = None,
) -> None:
    """Fill a store; returns at once when it is complete, goes on where a killed run stopped.

    Blocks run one after another over all sequences, forward for the input moments, then (last
    block first) again with a backward pass for the output gradients, so memory holds one block's
    sums; hidden states lie in memory-mapped files. What a token's output sends back
    (:mod:`advisor.calibration.fisher`) is drawn by a generator of its sequence, so results depend
    neither on batching nor on where a sequence stands.

    Args:
        loaded: The unquantized model; its data type is the one computed in. Sums are float32.
        sequences: Calibration sequences.
        store: Where the sums go (see :func:`open_store`).
        gradients: False is ``gradient="none"``: no backward pass.
        gradient: ``full``, ``diagonal`` or ``none``.
        prefixes: Sample counts whose sums are kept; by default 8, 16, 32, ... and all.
        seed: Seed of the signs that outputs send back.
        progress: Called with (steps done, steps in all).
        max_bytes: Refuse to start when more disk than this is needed.

    Raises:
        InputError: Not enough disk, a setting that breaks its rule, or tokens that the model does
            not know.

    Reference:
        Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
        curvature (2015): the Fisher is that of the model's own outputs, not of the data's.
    """
    if store.complete:
        return
    sequences.check_vocabulary(embedded_tokens(loaded.model))
    settings = collection_settings(
        loaded,
        sequences,
        gradient=gradient if gradients else "none",
        prefixes=prefixes,
        seed=seed,
        compact=store.compact,
    )
    collector = Collector(loaded, sequences, store, settings, progress)
    collector.check_disk(max_bytes)
    collector.runner.check(sequences.tokens.to(loaded.device))
    with store.lock(), repeatable(loaded.device):
        if not store.complete:  # another process may have collected them meanwhile
            collector.run()
