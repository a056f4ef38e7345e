"""Statistics of sequences from several sources: each source's sums are collected on their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.mixing import MixedStore
from advisor.calibration.settings import (
    collection_settings,
    default_prefixes,
    kept_bytes,
    needed_bytes,
)
from advisor.models.inspect import outer_specs

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel


def open_statistics(
    loaded: LoadedModel, sequences: TokenSequences, *, compact: bool = False
) -> Statistics:
    """Return the statistics of sequences, by source where there are several; complete or not.

    Args:
        loaded: The unquantized model.
        sequences: The calibration sequences.
        compact: Whether the room on disk is short: moments of inputs take 16 bits then, of fewer
            parts of the text.
    """
    parts = _by_source(sequences)
    if len(parts) < 2:
        return open_store(loaded, sequences, compact=compact)
    stores = {
        source: open_store(
            loaded, part, prefixes=_prefixes_of(sequences, source, compact), compact=compact
        )
        for source, part in parts.items()
    }
    prefixes = default_prefixes(sequences.sequences, compact=compact)
    return MixedStore(stores, sequences.sources, prefixes)


def collect(
    loaded: LoadedModel,
    sequences: TokenSequences,
    store: Statistics,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill what :func:`open_statistics` gave; every sequence is run once.

    Args:
        loaded: The unquantized model.
        sequences: The calibration sequences.
        store: Where the sums go.
        progress: Called with (steps done, steps in all).
    """
    if not isinstance(store, MixedStore):
        collect_statistics(loaded, sequences, store, progress=progress)
        return
    parts = _by_source(sequences)
    for number, (source, part) in enumerate(parts.items()):
        collect_statistics(
            loaded, part, store.stores[source],
            prefixes=_prefixes_of(sequences, source, store.compact),
            progress=_share_of(progress, number, len(parts)),
        )  # fmt: skip


def predicted_bytes(
    loaded: LoadedModel, sequences: TokenSequences, store: Statistics
) -> tuple[int, int]:
    """Return the disk that :func:`collect` still needs, at its peak and when it is done.

    What a killed run has left is not needed once more.
    """
    compact = store.compact
    if not isinstance(store, MixedStore):
        parts = [(store, sequences, list(default_prefixes(sequences.sequences, compact=compact)))]
    else:
        parts = [
            (store.stores[source], part, _prefixes_of(sequences, source, compact))
            for source, part in _by_source(sequences).items()
        ]
    config: Any = loaded.model.config
    outer = outer_specs(loaded.model)
    peak = kept = 0
    for own, part, prefixes in parts:
        if own.complete:
            continue
        settings = collection_settings(loaded, part, prefixes=prefixes, compact=compact)
        tokens, width = part.tokens.numel(), int(config.hidden_size)
        needed = needed_bytes(loaded.linears, settings, tokens, width, outer)
        peak = max(peak, kept + needed - own.disk_bytes)
        kept += kept_bytes(loaded.linears, settings, tokens, outer) - own.size_bytes
    return peak, kept


def _share_of(
    progress: Callable[[int, int], None] | None, number: int, parts: int
) -> Callable[[int, int], None] | None:
    """Return progress of one of several parts that are taken as equally long."""
    if progress is None:
        return None
    return lambda done, total: progress(number * total + done, parts * total)


def _prefixes_of(sequences: TokenSequences, source: str, compact: bool) -> list[int]:
    """Return how many of a source's sequences stand in each prefix of them all."""
    counts = [
        sequences.sources[:count].count(source)
        for count in default_prefixes(sequences.sequences, compact=compact)
    ]
    return sorted({count for count in counts if count})


def _by_source(sequences: TokenSequences) -> dict[str, TokenSequences]:
    """Return each source's sequences, in their order."""
    return {source: sequences.of_source(source) for source in dict.fromkeys(sequences.sources)}
