"""Which candidates to measure next: scores propose, measurements recalibrate them and decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from advisor.errors import InfeasibleError
from advisor.search.bisection import next_target
from advisor.search.finalists import Finalist, choose, excess_bytes, strain
from advisor.search.hopeless import FAR_BEHIND, best_by_score, known_kl, not_far_behind
from advisor.search.offers import beaten_already, worth_measuring
from advisor.search.sequential import can_be_sequential

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.search.compose import Composer
    from advisor.search.families import Family
    from advisor.search.goal import Goal
    from advisor.search.measuring import Measurer
    from advisor.search.mixture import Mixture

MOST_MIXTURES = 3
"""Methods whose mixture is measured at the same size."""
MOST_STEPS = 4
"""Further measurements on the way to a quality budget."""
MOST_OFFERS = 4
"""Uniform candidates of other formats and methods that are measured, or more if more compete."""
MOST_SEQUENTIAL = 3
"""Measurements of sequential codes on the way to a smaller answer."""
MOST_GROWTHS = 6
"""Times that an undecided candidate is measured on more text."""
_WITHIN_REACH = 1.3
"""How many times the answer's KL sequential codes may start from: they gain about a seventh."""
_GOOD_ENOUGH = 0.9


@dataclass(slots=True)
class Refiner:
    """Chooses and measures finalists.

    Attributes:
        composer: Makes candidates.
        measurer: Measures them.
        goal: What is wanted.
        families: Scored families, the most promising of each method first.
        stop: Asked before each measurement; True ends the refinement.
        progress: Makes what is told of a candidate's measurement.
        every_uniform: Whether the best uniform candidate of each method and format is measured, or
            only the one that scores say is best of all.
    """

    composer: Composer
    measurer: Measurer
    goal: Goal
    families: Sequence[Family]
    stop: Callable[[], bool]
    progress: Callable[[Mixture], Callable[[int, int], None]]
    every_uniform: bool = True
    _ratios: dict[str, list[float]] = field(default_factory=dict)

    def run(self, offers: Sequence[Mixture] = ()) -> None:
        """Measure finalists for the goal; they are the measurer's.

        Args:
            offers: Uniform candidates of no family; the one that scores say is best of all uniform
                candidates is measured before others, so that their measurements can end early.
        """
        if self.goal.smallest:
            self._search_smallest(offers)
        else:
            self._search_within(offers)

    def measure_offers(self, offers: Sequence[Mixture]) -> None:
        """Measure uniform candidates without scores: see :func:`worth_measuring`.

        Where the smallest is wanted, those smaller than what passes already, smallest first; else
        those that scores, where they have any, do not rule out.

        Args:
            offers: Least published loss first.
        """
        limit = self._limit() if self.goal.max_bytes is None else self.goal.max_bytes
        if not self.every_uniform:
            return
        if self.goal.smallest:
            passing = [f.mixture.size_bytes for f in self.measurer.finalists if f.passes]
            limit = min([limit, *(size - 1 for size in passing)])
        chosen = worth_measuring(offers, limit, MOST_OFFERS)
        if self.goal.smallest:
            chosen.sort(key=lambda mixture: mixture.size_bytes)
        for mixture in chosen:
            if beaten_already(mixture, self.measurer.finalists):
                continue
            predicted = known_kl(self.composer, mixture)
            if predicted is not None and self._is_hopeless(mixture.family, predicted):
                continue
            finalist = self._measure(mixture)
            if finalist is None or (self.goal.smallest and finalist.passes):
                return

    def settle(self) -> None:
        """Measure undecided candidates that would be the answer on more text, until it decides.

        Text that cannot be enough, by the spread seen so far, is not spent.
        """
        if not self.goal.has_quality_budget:
            return
        for _ in range(MOST_GROWTHS):
            found = self._undecided()
            if found is None or self.stop():
                return
            self.measurer.extend(found, self.progress(found.mixture))

    def _undecided(self) -> Finalist | None:
        """Return the candidate whose decision matters most, or None."""
        finalists = self.measurer.finalists
        if not finalists:
            return None
        answer = choose(finalists, self.goal)
        found = [
            f
            for f in finalists
            if f.decision.verdict == "undecided"
            and excess_bytes(f.mixture, self.goal) == 0
            and self.measurer.can_grow(f)
            and (f.decision.more_sequences or math.inf) <= self.measurer.left(f)
        ]
        if answer.passes and self.goal.smallest:
            found = [f for f in found if f.mixture.size_bytes < answer.mixture.size_bytes]
        elif answer.passes:
            found = [f for f in found if f.measured_kl < answer.measured_kl]

        def rank(finalist: Finalist) -> tuple[float, float]:
            size, kl = finalist.mixture.size_bytes, finalist.measured_kl
            return (size, kl) if self.goal.smallest else (kl, size)

        return min(found, key=rank, default=None)

    def refine_sequentially(self) -> None:
        """Measure the best that can be with each block fitted to the quantized ones before it.

        Where the smallest is wanted, what this gains is then spent on fewer bytes.
        """
        known = self.measurer.finalists
        able = [f for f in known if f.in_full and can_be_sequential(f.mixture.assignment)]
        if not able:
            return
        plain = choose(able, self.goal)
        if plain.measured_kl > _WITHIN_REACH * choose(known, self.goal).measured_kl:
            return
        best = plain.mixture
        finalist = self._measure(best.sequentially())
        if finalist is None or not self.goal.smallest or best.predicted_kl <= 0:
            return
        points = [finalist]
        for _ in range(MOST_SEQUENTIAL):
            if _GOOD_ENOUGH <= strain(points[-1], self.goal) <= 1:
                return
            target = next_target([(p.mixture.predicted_kl, strain(p, self.goal)) for p in points])
            mixture = self._smallest_for([best.family], target)
            passing = [f.mixture.size_bytes for f in self.measurer.finalists if f.passes]
            if mixture is None or not can_be_sequential(mixture.assignment):
                return
            if mixture.size_bytes >= min(passing, default=best.size_bytes):
                return
            finalist = self._measure(mixture.sequentially())
            if finalist is None:
                return
            points.append(finalist)

    def _search_within(self, offers: Sequence[Mixture]) -> None:
        """Measure the mixtures of each method at the edge of the size budget, then uniform ones."""
        limit = self._limit()
        mixtures = self._at_size(limit)
        for mixture in not_far_behind(mixtures, mixtures[:1])[:MOST_MIXTURES]:
            self._measure(mixture)
        # Measured mixtures say how far each method's scores are off, here of all places.
        uniforms = [m for m in self._uniforms() if m.size_bytes <= limit]
        beside = [m for m in offers if m.size_bytes <= limit]
        best = best_by_score(self.composer, [*uniforms, *beside], self._scaled)
        if best is not None and self._measure(best) is not None and self.every_uniform:
            self._measure_uniform(uniforms, most=2)

    def _search_smallest(self, offers: Sequence[Mixture]) -> None:
        """Bisect over the frontier of mixtures for the smallest that meets the quality budget."""
        first = self._smallest_for(self.families, self.goal.target_kl * 0.8)
        if first is None:  # nothing is expected to pass: the best there is shows by how much
            self._search_within(offers)
            return
        others = self._at_size(first.size_bytes, without=first.family.method)
        started = [first, *not_far_behind(others, [first])]
        measured = [self._measure(mixture) for mixture in started[:MOST_MIXTURES]]
        known = [finalist for finalist in measured if finalist is not None]
        if not known:
            return
        best = min(known, key=lambda finalist: strain(finalist, self.goal))
        points = [best]
        for _ in range(MOST_STEPS):
            if _GOOD_ENOUGH <= strain(points[-1], self.goal) <= 1:
                break
            target = next_target([(p.mixture.predicted_kl, strain(p, self.goal)) for p in points])
            mixture = self._smallest_for([best.mixture.family], target)
            if mixture is None or any(mixture.assignment == p.mixture.assignment for p in points):
                break
            finalist = self._measure(mixture)
            if finalist is None:
                return
            points.append(finalist)
        self._measure_smallest_uniform()

    def _measure_smallest_uniform(self) -> None:
        """Measure uniform candidates, smallest expected to pass first, until one does."""
        expected = [
            mixture
            for mixture in self._uniforms()
            if self._expected_kl(mixture) <= 1.3 * self.goal.target_kl
        ]
        by_size = sorted(expected, key=lambda m: (m.size_bytes, self._expected_kl(m)))
        if not by_size:  # none is expected to pass: the nearest one shows by how much
            by_size = sorted(self._uniforms(), key=self._expected_kl)[:1]
        for mixture in by_size[:2]:
            finalist = self._measure(mixture)
            if finalist is None or finalist.passes:
                return

    def _measure_uniform(self, uniforms: Sequence[Mixture], most: int) -> None:
        """Measure the most promising uniform candidates, of different methods."""
        done: set[str] = set()
        for mixture in sorted(uniforms, key=self._expected_kl):
            if mixture.family.method in done or len(done) >= most:
                continue
            if done and self._is_hopeless(mixture.family, mixture.predicted_kl):
                continue
            done.add(mixture.family.method)
            if self._measure(mixture) is None:
                return

    def _measure(self, mixture: Mixture) -> Finalist | None:
        """Measure a candidate, unless the search is to stop."""
        if self.stop():
            return None
        finalist = self.measurer.measure(mixture, self.progress(mixture))
        scored = mixture.predicted_kl > 0 and not mixture.family.sequential
        if scored and finalist.measured_kl > 0:
            ratio = math.log(finalist.measured_kl / mixture.predicted_kl)
            self._ratios.setdefault(mixture.family.method, []).append(ratio)
        return finalist

    def _is_hopeless(self, family: Family, predicted: float) -> bool:
        """Whether a candidate's score says that it cannot be the answer, least KL being wanted."""
        best = min((f.measured_kl for f in self.measurer.finalists), default=math.inf)
        return not self.goal.smallest and self._scaled(family, predicted) > FAR_BEHIND * best

    def _expected_kl(self, mixture: Mixture) -> float:
        return self._scaled(mixture.family, mixture.predicted_kl)

    def _scaled(self, family: Family, predicted: float) -> float:
        """Return a predicted KL, scaled by what measuring has shown of the method's scores."""
        known = self._ratios.get(family.method)
        if not known:
            known = [ratio for ratios in self._ratios.values() for ratio in ratios]
        scale = math.exp(sum(known) / len(known)) if known else 1.0
        return predicted * scale

    def _limit(self) -> int:
        """Return the size budget, or the smallest size there is where that is larger."""
        smallest, largest = self.composer.smallest_and_largest()
        limit = largest.total_bytes if self.goal.max_bytes is None else self.goal.max_bytes
        return max(limit, smallest.total_bytes)

    def _at_size(self, limit: int, without: str | None = None) -> list[Mixture]:
        """Return the best mixture of each method within a size, best score first."""
        found: list[Mixture] = []
        methods: set[str] = set() if without is None else {without}
        for family in self.families:
            if family.method in methods:
                continue
            methods.add(family.method)
            mixture = self.composer.mixture(family, limit, or_smallest=True)
            if all(mixture.assignment != other.assignment for other in found):
                found.append(mixture)
        return sorted(found, key=lambda mixture: mixture.predicted_kl)

    def _smallest_for(self, families: Sequence[Family], max_kl: float) -> Mixture | None:
        """Return the smallest mixture within a predicted KL, of any of the families."""
        found = []
        for family in families:
            try:
                found.append(self.composer.mixture_for(family, max_kl))
            except InfeasibleError:
                continue
        return min(found, key=lambda mixture: mixture.size_bytes, default=None)

    def _uniforms(self) -> list[Mixture]:
        return [mixture for family in self.families for mixture in self.composer.uniforms(family)]
