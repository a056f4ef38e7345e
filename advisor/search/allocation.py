"""Exact choice of one option per fused group: the multiple-choice knapsack.

Every fused group of modules picks one option; an option has a cost (bytes) and a score (predicted
KL, additive over groups). :func:`allocate` returns the assignment of least score within a cost
limit, :func:`allocate_for_score` the cheapest one within a score limit, :func:`frontier` every
assignment that no other one beats in both.

Exactness: partial assignments are extended group by group. One is dropped only when (a) another
one costs no more and scores no more (dominance: whatever completes the first completes the second
at least as well), or (b) even the linear relaxation of the groups still open, a lower bound of
what they can add within the cost that is left, does not beat an assignment already in hand. Both
keep an optimum. The relaxation of a multiple-choice knapsack is its groups' lower convex hulls
merged by slope, so that the bound of thousands of partial assignments is one interpolation, and
since it is at most one option away from an integer solution, few survive.

Reference: Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27
(1979), the relaxation; Dudzinski and Walukiewicz, EJOR 28 (1987), bounds within dynamic
programming.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advisor.errors import InfeasibleError, InputError
from advisor.search.relaxation import Floats, Indices, greedy, hull, open_bounds, steps

if TYPE_CHECKING:
    from numpy.typing import NDArray


_RELATIVE_SLACK = 1e-12
"""Sums in another order differ by rounding: bounds closer than this count as equal."""


@dataclass(frozen=True, slots=True)
class Option:
    """One way to store a fused group.

    Attributes:
        name: Scheme's name, unique within the group.
        cost: Bytes (or any other additive cost), zero or positive.
        score: Predicted KL in nats per token (or any other additive score to be kept low).
    """

    name: str
    cost: float
    score: float


@dataclass(frozen=True, slots=True)
class Allocation:
    """One option for every group.

    Attributes:
        choice: Group's name to option's name.
        cost: Sum of the options' costs.
        score: Sum of the options' scores.
    """

    choice: Mapping[str, str]
    cost: float
    score: float


Groups = Mapping[str, Sequence[Option]]
"""Fused group's name to its options."""


def restrict(groups: Groups, forced: Mapping[str, str], excluded: Collection[str] = ()) -> Groups:
    """Return the groups with forced options as the only ones, and without excluded groups.

    Args:
        groups: All groups.
        forced: Group's name to the name of the option that it must take.
        excluded: Groups that are left out of the allocation (kept as they are, at no cost).

    Raises:
        InputError: A forced or excluded group, or a forced option, does not exist.
    """
    unknown = sorted((forced.keys() | set(excluded)) - groups.keys())
    if unknown:
        raise InputError(f"unknown fused groups: {', '.join(unknown)}.")
    result = {}
    for name, options in groups.items():
        if name in excluded:
            continue
        if name in forced:
            options = [option for option in options if option.name == forced[name]]
            if not options:
                known = ", ".join(option.name for option in groups[name])
                raise InputError(
                    f"group {name} has no option {forced[name]!r}: use one of {known}."
                )
        result[name] = options
    return result


def allocate(groups: Groups, limit: float) -> Allocation:
    """Return the assignment of least score whose cost is within the limit.

    Among assignments of equal score, one of least cost is returned.

    Raises:
        InputError: A group has no options, or a cost or score is not a finite number.
        InfeasibleError: Even the cheapest options cost more than the limit.
    """
    _check(groups)
    cost = [np.array([option.cost for option in options]) for options in groups.values()]
    score = [np.array([option.score for option in options]) for options in groups.values()]
    cheapest = float(sum(values.min() for values in cost))
    if cheapest > limit:
        raise InfeasibleError(
            f"the cheapest options cost {cheapest:,.0f} in all, more than the limit {limit:,.0f}."
        )
    return _named(groups, _solve(cost, score, limit))


def allocate_for_score(groups: Groups, limit: float) -> Allocation:
    """Return the cheapest assignment whose score is within the limit.

    Raises:
        InputError: A group has no options, or a cost or score is not a finite number.
        InfeasibleError: Even the options of least score exceed the limit.
    """
    _check(groups)
    cost = [np.array([option.cost for option in options]) for options in groups.values()]
    score = [np.array([option.score for option in options]) for options in groups.values()]
    lowest = float(sum(values.min() for values in score))
    if lowest > limit:
        raise InfeasibleError(
            f"the best options score {lowest:.6g} in all, more than the limit {limit:.6g}."
        )
    return _named(groups, _solve(score, cost, limit))


def frontier(groups: Groups, *, most: int = 200_000) -> list[Allocation]:
    """Return every assignment that no other one beats in cost and score, by rising cost.

    The number of partial assignments kept is at most the number of distinct costs, which is small
    because blocks of a model have equal shapes.

    Args:
        groups: The groups.
        most: Largest number of undominated partial assignments that memory is spent on.

    Raises:
        InputError: As :func:`allocate`; or the frontier has more points than ``most``: solve for
            single limits instead.
    """
    _check(groups)
    stages = []
    costs, scores = np.zeros(1), np.zeros(1)
    for options in groups.values():
        costs, scores, parent, option = _extend(
            costs,
            scores,
            np.array([option.cost for option in options]),
            np.array([option.score for option in options]),
        )
        if len(costs) > most:
            raise InputError(
                f"the frontier has more than {most} points: allocate for single limits instead."
            )
        stages.append((parent, option))
    choices = _trace(stages, np.arange(len(costs)))
    return [_named(groups, row) for row in choices]


def supported_frontier(groups: Groups) -> list[Allocation]:
    """Return the corners of the frontier's lower convex hull, by rising cost.

    Each corner is an optimum at its own cost; neighbours differ in one group's option, so that
    they are close. Takes milliseconds whatever the costs are.

    Raises:
        InputError: As :func:`allocate`.
    """
    _check(groups)
    cost = [np.array([option.cost for option in options]) for options in groups.values()]
    score = [np.array([option.score for option in options]) for options in groups.values()]
    hulls = [hull(c, s) for c, s in zip(cost, score, strict=True)]
    choice = np.array([corners[0] for corners in hulls], dtype=np.int64)
    rows = [choice.copy()]
    for _, group, option in steps(cost, score, hulls):
        choice[group] = option
        rows.append(choice.copy())
    return [_named(groups, row) for row in rows]


def _check(groups: Groups) -> None:
    """Refuse empty groups and numbers that cannot be compared."""
    if empty := [name for name, options in groups.items() if not options]:
        raise InputError(f"every group needs at least one option, but there is none for {empty}.")
    bad = [
        f"{name}/{option.name}"
        for name, options in groups.items()
        for option in options
        if not (np.isfinite(option.cost) and np.isfinite(option.score))
        or option.cost < 0
        or option.score < 0
    ]
    if bad:
        raise InputError(f"costs and scores must be finite and not negative, but see {bad[:5]}.")


def _solve(cost: Sequence[Floats], score: Sequence[Floats], limit: float) -> Indices:
    """Return one option per group: least score within the cost limit, which must be feasible."""
    limit = limit * (1 + _RELATIVE_SLACK)
    hulls = [hull(c, s) for c, s in zip(cost, score, strict=True)]
    incumbent = greedy(cost, score, hulls, limit)
    best = float(sum(score[group][option] for group, option in enumerate(incumbent)))
    # Groups of wide score range first: the bound is then decided early.
    order = sorted(range(len(cost)), key=lambda group: -float(np.ptp(score[group])))
    bounds = open_bounds([cost[g] for g in order], [score[g] for g in order], order, hulls)
    slack = _RELATIVE_SLACK * (1 + sum(float(values.max()) for values in score))
    costs, scores = np.zeros(1), np.zeros(1)
    stages = []
    for group, (bound_cost, bound_score) in zip(order, bounds, strict=True):
        costs, scores, parent, option = _extend(costs, scores, cost[group], score[group])
        left = limit - costs - bound_cost[0]
        bound = scores + np.interp(left, bound_cost - bound_cost[0], bound_score)
        keep = (left >= 0) & (bound <= best + slack)
        costs, scores = costs[keep], scores[keep]
        stages.append((parent[keep], option[keep]))
        if not len(costs):  # nothing beats or equals the assignment in hand
            return incumbent
    last = np.array([np.lexsort((costs, scores))[0]])
    result = np.empty(len(order), dtype=np.int64)
    result[order] = _trace(stages, last)[0]
    return result


def _extend(
    costs: Floats, scores: Floats, option_cost: Floats, option_score: Floats
) -> tuple[Floats, Floats, NDArray[np.int32], NDArray[np.int16]]:
    """Add every option to every partial assignment; return the undominated ones by rising cost."""
    options = len(option_cost)
    all_costs = (costs[:, None] + option_cost[None, :]).ravel()
    all_scores = (scores[:, None] + option_score[None, :]).ravel()
    order = np.lexsort((all_scores, all_costs))
    sorted_scores = all_scores[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_scores)[:-1]))
    kept = order[sorted_scores < before]
    return (
        all_costs[kept],
        all_scores[kept],
        (kept // options).astype(np.int32),
        (kept % options).astype(np.int16),
    )


def _trace(stages: Sequence[tuple[NDArray[np.int32], NDArray[np.int16]]], last: Indices) -> Indices:
    """Follow the parents back from the last stage; return options [assignments, groups]."""
    result = np.empty((len(last), len(stages)), dtype=np.int64)
    state = last.astype(np.int32)
    for position in range(len(stages) - 1, -1, -1):
        parent, option = stages[position]
        result[:, position] = option[state]
        state = parent[state]
    return result


def _named(groups: Groups, row: Indices) -> Allocation:
    """Return an assignment by names, its sums taken in the groups' own order."""
    chosen = [options[int(index)] for options, index in zip(groups.values(), row, strict=True)]
    return Allocation(
        choice={name: option.name for name, option in zip(groups, chosen, strict=True)},
        cost=sum(option.cost for option in chosen),
        score=sum(option.score for option in chosen),
    )
