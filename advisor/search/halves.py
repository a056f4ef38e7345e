"""Statistics for scoring: codes are fitted to one half of the text and judged by the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.calibration.coverage import FittedStatistics
from advisor.calibration.mixing import of_mix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.modelspec import LinearSpec


_Halved = tuple["LayerStatistics", list["LayerStatistics"]]


class Halves:
    """The two halves of a store's statistics."""

    def __init__(self, store: Statistics, linears: Sequence[LinearSpec]) -> None:
        """Prepare.

        Args:
            store: Complete statistics.
            linears: The model's quantizable modules.
        """
        self._store = store
        self._linears = linears
        self._judges = FittedStatistics(store, linears)
        self._latest: tuple[tuple[str, int | None, str], _Halved] | None = None

    @property
    def fitted_samples(self) -> int | None:
        """Sequences that codes are fitted to; the rest judge. None: there is no such split."""
        prefixes = sorted(self._store.prefixes)
        return max((count for count in prefixes if 2 * count <= prefixes[-1]), default=None)

    def statistics(
        self, members: Sequence[LinearSpec], samples: int | None, mix: str
    ) -> tuple[LayerStatistics, list[LayerStatistics]]:
        """Return the statistics to fit codes to, and those of each member to judge them by.

        Whatever mix codes are fitted to, all are judged on the given one. What was returned last is
        kept: methods with settings of their own ask for the same one after the other.

        Args:
            members: Modules that share their inputs.
            samples: Sequences to fit to, of those that are fitted to; None for all of these.
            mix: Of the sources of text.
        """
        half = self.fitted_samples
        count = half if samples is None or half is None else min(samples, half)
        key = members[0].input_group, samples if half is None else count, mix
        if self._latest is None or self._latest[0] != key:
            self._latest = None  # before there are two
            self._latest = key, self._halved(members, key[1], mix)
        return self._latest[1]

    def _halved(
        self, members: Sequence[LinearSpec], samples: int | None, mix: str
    ) -> tuple[LayerStatistics, list[LayerStatistics]]:
        """Read the statistics; ``samples`` are those to fit to."""
        own = FittedStatistics(of_mix(self._store, mix), self._linears)
        first = self._store.layer(members[0])
        # They share the inputs; only the gradients are their own.
        whole = [first, *(self._store.with_gradient(first, linear) for linear in members[1:])]
        if self.fitted_samples is None:
            return own.layer(members[0], samples), self._helped(whole, members)
        half = self._store.layer(members[0], self.fitted_samples, gradients=False)
        fitted = own.layer(members[0], samples)
        second_moment = first.second_moment - half.second_moment
        tokens = first.tokens - half.tokens
        weight = None if first.moment_weight is None else first.rows - half.rows
        judges = [
            replace(s, second_moment=second_moment, tokens=tokens, moment_weight=weight)
            for s in whole
        ]
        return fitted, self._helped(judges, members)

    def _helped(
        self, found: Sequence[LayerStatistics], members: Sequence[LinearSpec]
    ) -> list[LayerStatistics]:
        """Return statistics that judge codes; experts seen too rarely are helped as for fitting."""
        pairs = zip(found, members, strict=True)
        return [self._judges.helped(own, linear) for own, linear in pairs]
