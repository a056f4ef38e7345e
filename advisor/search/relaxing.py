"""What would have to give way where nothing meets the budgets, as measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.budgets import loosened
from advisor.predict.explain import relaxed_in_words
from advisor.search.finalists import Finalist, excess_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.budgets import Budgets
    from advisor.search.limits import SizeLimit
    from advisor.search.refine import Refiner


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A changed budget, and the candidate that then is an answer.

    Attributes:
        budget: As :meth:`advisor.budgets.Budgets.limits` names it.
        limit: The budget as given; of memory also what the device has.
        needed: What it would have to be, in round figures; the other budgets stay.
        candidate: Name of the candidate.
        also: Further changes that are needed together with it.
        assumed: Whether the limit is what the device has, and no budget.
    """

    budget: str
    limit: float
    needed: float
    candidate: str
    also: tuple[Relaxation, ...] = ()
    assumed: bool = False

    @property
    def text(self) -> str:
        """The changes in words, with the options that make them."""
        parts = [part.words for part in (self, *self.also)]
        return f"{' and '.join(parts)}, with {self.candidate}"

    @property
    def words(self) -> str:
        """This change alone."""
        return relaxed_in_words(self.budget, self.limit, self.needed, assumed=self.assumed)

    def to_dict(self) -> dict[str, object]:
        """Return it as ``recommend --json`` writes relaxations; ``also`` only where any."""
        found: dict[str, object] = {
            "budget": self.budget,
            "from": self.limit,
            "to": self.needed,
            "candidate": self.candidate,
            "text": self.text,
        }
        if self.also:
            found["also"] = [change.to_dict() for change in self.also]
        return found


def relaxations(
    refiner: Refiner, budgets: Budgets, limits: Sequence[SizeLimit]
) -> tuple[Relaxation, ...]:
    """Return the smallest changes that have an answer, measuring what that takes.

    Args:
        refiner: After its own run, which found nothing within all the budgets.
        budgets: As given by the user.
        limits: What the budgets on size, memory and speed leave for the checkpoint.
    """
    goal = refiner.goal
    found: list[Relaxation] = []
    measured = [f for f in refiner.measurer.finalists if f.in_full]
    within = [f for f in measured if excess_bytes(f.mixture, goal) == 0]
    if within and goal.has_quality_budget:
        needs = [changes for f in within if (changes := _quality(f, budgets))]
        found += _least(needs)
    if goal.max_bytes is None:
        return tuple(found)
    free = replace(refiner, goal=replace(goal, max_bytes=None, smallest=goal.has_quality_budget))
    if goal.has_quality_budget:
        free.run()
    candidates = [f for f in refiner.measurer.finalists if f.passes]
    if candidates:
        smallest = min(candidates, key=lambda f: f.mixture.size_bytes)
        found = _least([_bytes(smallest, limits)]) + found
    if not within and goal.has_quality_budget:
        found += _both(refiner, budgets, limits)
    return tuple(found)


def _both(refiner: Refiner, budgets: Budgets, limits: Sequence[SizeLimit]) -> list[Relaxation]:
    """Return what would do beside more bytes, where even the smallest is over the size budget.

    No loss is large enough then for the size as given, so that both must give way. Of all that
    was measured, and the smallest candidates, the one counts that asks the least: the product of
    the ratios of what is needed to what was given.
    """
    goal = replace(refiner.goal, smallest=False)
    replace(refiner, goal=goal).run()
    measured = [f for f in refiner.measurer.finalists if f.in_full]
    enough = min((f.mixture.size_bytes for f in measured if f.passes), default=math.inf)
    return _least(
        [
            [*_bytes(f, limits), *changes]
            for f in measured
            if f.mixture.size_bytes < enough and (changes := _quality(f, budgets))
        ]
    )


def _least(needs: Sequence[Sequence[Relaxation]]) -> list[Relaxation]:
    """Return, as one, what the candidate needs together that asks the least; none of none."""
    needs = [changes for changes in needs if changes]
    if not needs:
        return []
    first, *others = min(needs, key=lambda changes: sum(map(_asked, changes)))
    return [replace(first, also=tuple(others))]


def _asked(change: Relaxation) -> float:
    """Return how much a change asks for, as the logarithm of the ratio to the budget."""
    if change.limit <= 0 or change.needed <= 0:
        return math.inf
    return abs(math.log(change.needed / change.limit))


def _bytes(finalist: Finalist, limits: Sequence[SizeLimit]) -> list[Relaxation]:
    """Return what budgets on size, memory and speed would have to be for a candidate."""
    size = finalist.mixture.size_bytes
    found = []
    for limit in limits:
        needed = limit.needed(size) if size > limit.max_bytes else None
        if needed is not None:
            asked, given, assumed = loosened(limit.budget, needed), limit.given, limit.assumed
            if limit.most is not None and asked > limit.most and not assumed:
                given, assumed = limit.most, True  # no option gives what the device does not have
            found.append(Relaxation(limit.budget, given, asked, finalist.name, assumed=assumed))
    return found


def _quality(finalist: Finalist, budgets: Budgets) -> list[Relaxation]:
    """Return what the quality budgets would have to be for a candidate to pass."""
    highs = {"max_loss": finalist.loss_high, "max_kl": finalist.kl_high}
    if finalist.accuracy_drop_high is not None:
        highs["max_accuracy_drop"] = finalist.accuracy_drop_high
    given = budgets.limits()
    return [
        Relaxation(budget, given[budget], loosened(budget, high), finalist.name)
        for budget, high in highs.items()
        if budget in given and high > given[budget]
    ]
