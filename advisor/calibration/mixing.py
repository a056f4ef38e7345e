"""Mixes of calibration sources: each source's sums collected once, combined with any weights.

Sums over tokens add up, so a mix of sources in other proportions than the text was drawn in, or
one source alone, needs no further forward pass: the sums of each source are scaled and added.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Union

import torch

from advisor.calibration.settings import (
    default_prefixes,
)
from advisor.calibration.statistics import merge
from advisor.errors import InputError
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.calibration.store import StatisticsStore
    from advisor.calibration.tokens import TokenSequences
    from advisor.modelspec import LinearSpec

GIVEN = "given"
"""The mix in which the sequences were drawn."""
EQUAL = "equal"
"""Every source counts as much as another."""
ALONE = "only "
"""Before a source's name: that source and no other."""
Statistics = Union["StatisticsStore", "MixedStore"]
"""What can be read layer by layer: of one source, or of a mix of several."""
_MOST_SOURCES = 4
"""Sources that are tried alone; of more, the largest."""


def mixes(sequences: TokenSequences) -> tuple[str, ...]:
    """Return the mixes worth choosing between: as given, equal, each source alone.

    A source that some prefix of the sequences lacks is not tried alone.
    """
    counted = Counter(sequences.sources)
    if len(counted) < 2:
        return (GIVEN,)
    first = set(sequences.sources[: default_prefixes(sequences.sequences)[0]])
    alone = [source for source, _ in counted.most_common(_MOST_SOURCES) if source in first]
    equal = [EQUAL] if len(set(counted.values())) > 1 else []
    return (GIVEN, *equal, *(ALONE + source for source in alone))


def sequence_weights(sequences: TokenSequences, mix: str) -> Tensor:
    """Return how much each sequence counts in a mix, float32 [sequences], adding up to them all.

    Raises:
        InputError: The sequences have no such mix.
    """
    if mix == GIVEN:
        return torch.ones(sequences.sequences)
    counted = Counter(sequences.sources)
    shares = _shares(tuple(counted), mix)
    weights = [
        shares[source] * sequences.sequences / counted[source] for source in sequences.sources
    ]
    return torch.tensor(weights, dtype=torch.float32)


def _shares(sources: tuple[str, ...], mix: str) -> dict[str, float]:
    """Return each source's share of a mix other than the given one."""
    if mix == EQUAL and len(sources) > 1:
        return dict.fromkeys(sources, 1 / len(sources))
    wanted = mix.removeprefix(ALONE)
    if not mix.startswith(ALONE) or wanted not in sources:
        raise InputError(
            f"calibration_mix must be {GIVEN!r}, {EQUAL!r} or {ALONE + 'SOURCE'!r} with one of "
            f"the sources {', '.join(sources) or '(there is one alone)'}, but got {mix!r}."
        )
    return {source: float(source == wanted) for source in sources}


@dataclass(frozen=True, slots=True)
class MixedStore:
    """Statistics of several sources, read as those of one mix of them.

    It is read as a :class:`StatisticsStore` is.

    Attributes:
        stores: Each source's own statistics, in order of first appearance.
        sources: The source of every sequence.
        prefixes: Sample counts, of all sources together, that can be read.
        mix: Which mix is read.
    """

    stores: Mapping[str, StatisticsStore]
    sources: tuple[str, ...]
    prefixes: tuple[int, ...]
    mix: str = GIVEN

    @property
    def key(self) -> str:
        """Name of what is read; the mix is no part of it, but of the settings that choose it."""
        return sha256_json([[store.key for store in self.stores.values()], self.sources])[:32]

    @property
    def compact(self) -> bool:
        """Whether second moments of inputs are kept in 16 bits."""
        return any(store.compact for store in self.stores.values())

    @property
    def complete(self) -> bool:
        """Whether every source's statistics are there."""
        return all(store.complete for store in self.stores.values())

    @property
    def work_folder(self) -> Path:
        """Folder of what a run keeps only until it is done."""
        return next(iter(self.stores.values())).work_folder

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass was part of every source's."""
        return all(store.has_gradients for store in self.stores.values())

    def layer(
        self, linear: LinearSpec, samples: int | None = None, *, gradients: bool = True
    ) -> LayerStatistics:
        """Return a linear's statistics in the mix.

        Args:
            linear: Which one.
            samples: Use only the first samples of all sources together; one of the prefixes.
            gradients: False leaves them out, which saves reading them.

        Raises:
            InputError: There is no such prefix, or no such mix.
        """
        count = len(self.sources) if samples is None else samples
        if count not in self.prefixes:
            raise InputError(
                f"statistics were kept for {', '.join(map(str, self.prefixes))} samples, but not "
                f"for {count}. Use one of these."
            )
        counted = Counter(self.sources[:count])
        found = {
            source: store.layer(linear, counted[source], gradients=gradients)
            for source, store in self.stores.items()
            if counted[source]
        }
        if self.mix == GIVEN:
            return reduce(merge, found.values())
        shares = _shares(tuple(self.stores), self.mix)
        tokens = sum(statistics.tokens for statistics in found.values())
        used = {source: part for source, part in found.items() if shares[source] > 0}
        total = sum(shares[source] for source in used)
        if not total:
            raise InputError(f"the first {count} samples have nothing of mix {self.mix!r}.")
        parts = [
            _scaled(part, shares[source] / total * tokens / max(1, part.tokens))
            for source, part in used.items()
        ]
        return replace(reduce(merge, parts), tokens=tokens)

    def weights(self, linear: LinearSpec) -> Tensor | None:
        """Return how much each token counts, as :meth:`StatisticsStore.weights` does."""
        found = {source: store.weights(linear) for source, store in self.stores.items()}
        if any(weights is None for weights in found.values()):
            return None
        rows = {
            source: iter(weights.reshape(self.sources.count(source), -1))
            for source, weights in found.items()
            if weights is not None
        }
        return torch.cat([next(rows[source]) for source in self.sources])

    def tokens(self, linear: LinearSpec, samples: int | None = None) -> int:
        """Return how many input rows were summed: of an expert, the tokens routed to it."""
        counted = Counter(self.sources[: len(self.sources) if samples is None else samples])
        return sum(
            store.tokens(linear, counted[source])
            for source, store in self.stores.items()
            if counted[source]
        )

    def with_gradient(self, statistics: LayerStatistics, linear: LinearSpec) -> LayerStatistics:
        """Return statistics with a linear's own gradients, of another that reads the same input."""
        found = self.layer(linear)
        return replace(
            statistics,
            gradient_tokens=found.gradient_tokens,
            gradient_moment=found.gradient_moment,
        )


def _scaled(statistics: LayerStatistics, factor: float) -> LayerStatistics:
    """Return sums as if every token had come ``factor`` times; gradients serve scores alone."""
    return replace(
        statistics,
        second_moment=statistics.second_moment * factor,
        absolute_sum=statistics.absolute_sum * factor,
        moment_weight=None if statistics.moment_weight is None else statistics.rows * factor,
        gradient_tokens=0,
        gradient_moment=None,
    )


def of_mix(store: Statistics, mix: str) -> Statistics:
    """Return the store, read as a mix of its sources.

    Raises:
        InputError: It has one source alone, and another mix than the given one was asked for.
    """
    if mix == GIVEN:
        return store if not isinstance(store, MixedStore) else replace(store, mix=GIVEN)
    if not isinstance(store, MixedStore):
        _shares((), mix)
        raise InputError(f"calibration_mix {mix!r} needs several sources of text.")
    _shares(tuple(store.stores), mix)
    return replace(store, mix=mix)
