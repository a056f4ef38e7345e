"""The last measurements of a search: sizes between what passed and what did not, the nearest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.search.bisection import next_target
from advisor.search.finalists import Finalist, choose, nearest, strain
from advisor.search.sequential import can_be_sequential

if TYPE_CHECKING:
    from advisor.search.families import Family
    from advisor.search.mixture import Mixture
    from advisor.search.refine import Refiner

SMALLEST_GAP = 0.015
"""Share of the answer's bytes: a gap this small between failing and passing sizes is left."""
MOST_FILLS = 4
"""Measurements that closing the gap may take."""
_MARGIN = 0.2
"""Share of a gap at either end into which no candidate is placed: it would hardly halve it."""


def fill_gap(refiner: Refiner) -> None:
    """Where the smallest is wanted, measure sizes between the answer and what failed below it.

    The answer's family says what failed: another method's failure says nothing of this one. Sizes
    between are placed where the measured strains say that the budget is just met, and well inside
    the gap; where nothing failed yet, the smallest checkpoint there is counts as failing.

    Args:
        refiner: After its own search.
    """
    if not refiner.goal.smallest:
        return
    for _ in range(MOST_FILLS):
        finalists = refiner.measurer.finalists
        if not finalists:
            return
        answer = choose(finalists, refiner.goal)
        if not answer.passes:
            return
        mixture = _between(refiner, answer)
        if mixture is None or refiner.stop():
            return
        if any(f.mixture == mixture for f in finalists):
            return
        refiner.measurer.measure(mixture, refiner.progress(mixture))
        refiner.settle()


def _between(refiner: Refiner, answer: Finalist) -> Mixture | None:
    """Return a candidate of a size inside the gap below the answer; None where that is small."""
    family, size = answer.mixture.family, answer.mixture.size_bytes
    known = [f for f in refiner.measurer.finalists if _scored_alike(f, answer)]
    smallest, _ = refiner.composer.smallest_and_largest()
    failed = [f.mixture.size_bytes for f in known if not f.passes and f.mixture.size_bytes < size]
    low = max(failed, default=smallest.total_bytes)
    gap = size - low
    if gap <= SMALLEST_GAP * size or answer.mixture.predicted_kl <= 0:
        return None
    points = [(f.mixture.predicted_kl, strain(f, refiner.goal)) for f in known]
    scored = replace(family, sequential=False)
    aimed = refiner.composer.mixture_for(scored, next_target(points)).size_bytes
    at = min(max(aimed, low + _MARGIN * gap), size - _MARGIN * gap)
    mixture = refiner.composer.mixture(scored, int(at), or_smallest=True)
    if not low < mixture.size_bytes < size:
        return None
    if not family.sequential:
        return mixture
    return mixture.sequentially() if can_be_sequential(mixture.assignment) else None


def _scored_alike(finalist: Finalist, answer: Finalist) -> bool:
    """Whether a finalist's failure says something of the answer's family."""
    mine: Family = finalist.mixture.family
    return mine == answer.mixture.family and finalist.mixture.predicted_kl > 0


def complete_nearest(refiner: Refiner) -> None:
    """Where nothing meets the budgets, measure what is nearest to them in full.

    Args:
        refiner: After all other measurements.
    """
    finalists = refiner.measurer.finalists
    while finalists and not refiner.stop():
        found = nearest(finalists, refiner.goal)
        if found.in_full or choose(finalists, refiner.goal).passes:
            return
        refiner.measurer.complete(found, refiner.progress(found.mixture))
