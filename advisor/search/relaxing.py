"""What would have to give way where nothing meets the budgets, as measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.search.finalists import Finalist, excess_bytes

if TYPE_CHECKING:
    from advisor.budgets import Budgets
    from advisor.search.refine import Refiner


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A changed budget, and the candidate that then is an answer.

    Attributes:
        budget: ``max_size``, ``max_loss``, ``max_kl`` or ``max_accuracy_drop``.
        limit: The budget as given.
        needed: What it would have to be; the other budgets stay.
        candidate: Name of the candidate.
        also: Further changes that are needed together with it.
    """

    budget: str
    limit: float
    needed: float
    candidate: str
    also: tuple[Relaxation, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Return it as ``recommend --json`` writes relaxations; ``also`` only where any."""
        found: dict[str, object] = {
            "budget": self.budget,
            "from": self.limit,
            "to": self.needed,
            "candidate": self.candidate,
        }
        if self.also:
            found["also"] = [change.to_dict() for change in self.also]
        return found


def relaxations(refiner: Refiner, budgets: Budgets) -> tuple[Relaxation, ...]:
    """Return the smallest changes that have an answer, measuring what that takes.

    Args:
        refiner: After its own run, which found nothing within all the budgets.
        budgets: As given by the user.
    """
    goal = refiner.goal
    found: list[Relaxation] = []
    measured = [f for f in refiner.measurer.finalists if f.in_full]
    within = [f for f in measured if excess_bytes(f.mixture, goal) == 0]
    if within and goal.has_quality_budget:
        best = min(within, key=lambda f: f.measured_kl)
        found += _quality(best, budgets)
    if goal.max_bytes is None:
        return tuple(found)
    free = replace(refiner, goal=replace(goal, max_bytes=None, smallest=goal.has_quality_budget))
    if goal.has_quality_budget:
        free.run()
    candidates = [f for f in refiner.measurer.finalists if f.passes]
    if candidates:
        smallest = min(candidates, key=lambda f: f.mixture.size_bytes)
        size = smallest.mixture.size_bytes
        found.insert(0, Relaxation("max_size", goal.max_bytes, size, smallest.name))
    if not within and goal.has_quality_budget:
        found += _both(refiner, budgets, goal.max_bytes)
    return tuple(found)


def _both(refiner: Refiner, budgets: Budgets, max_bytes: int) -> list[Relaxation]:
    """Return what would do beside more bytes, where even the smallest is over the size budget.

    No loss is large enough then for the size as given, so that both must give way. Of all that
    was measured, and the smallest candidates, the one counts that asks the least: the product of
    the ratios of what is needed to what was given.
    """
    goal = replace(refiner.goal, smallest=False)
    replace(refiner, goal=goal).run()
    measured = [f for f in refiner.measurer.finalists if f.in_full]
    enough = min((f.mixture.size_bytes for f in measured if f.passes), default=math.inf)
    found = [
        Relaxation("max_size", max_bytes, f.mixture.size_bytes, f.name, tuple(changes))
        for f in measured
        if f.mixture.size_bytes < enough and (changes := _quality(f, budgets))
    ]
    return [min(found, key=_asked)] if found else []


def _asked(change: Relaxation) -> float:
    """Return how much a change asks for, as the logarithm of the ratios to the budgets."""
    return math.log(change.needed / change.limit) + sum(_asked(other) for other in change.also)


def _quality(best: Finalist, budgets: Budgets) -> list[Relaxation]:
    """Return what the quality budgets would have to be for a candidate to pass."""
    found = []
    loss, kl = best.loss_high, best.kl_high
    if budgets.max_loss is not None and loss > budgets.max_loss:
        found.append(Relaxation("max_loss", budgets.max_loss, _rounded_up(loss), best.name))
    if budgets.max_kl is not None and kl > budgets.max_kl:
        found.append(Relaxation("max_kl", budgets.max_kl, _rounded_up(kl), best.name))
    limit = budgets.max_accuracy_drop
    if limit is not None and best.task is not None and best.task.drop.high > limit:
        needed = _rounded_up(best.task.drop.high)
        found.append(Relaxation("max_accuracy_drop", limit, needed, best.name))
    return found


def _rounded_up(value: float) -> float:
    """Return a limit of three digits that the value meets."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / step) * step
