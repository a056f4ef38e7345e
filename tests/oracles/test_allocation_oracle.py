"""The knapsack against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest

from advisor.errors import InfeasibleError
from advisor.search.allocation import (
    Option,
    allocate,
    allocate_for_score,
    frontier,
    supported_frontier,
)


def _everything(groups):
    """Cost and score of every assignment."""
    return [
        (sum(option.cost for option in row), sum(option.score for option in row))
        for row in itertools.product(*groups.values())
    ]


def _instance(seed: int, *, collinear: bool = False):
    generator = random.Random(seed)
    groups = {}
    for index in range(generator.randint(1, 5)):
        options = []
        for option in range(generator.randint(1, 5)):
            cost = generator.randint(0, 12)
            score = 24 - 2 * cost if collinear else generator.choice([0, 1, 2, 5, 9, 20])
            options.append(Option(f"option{option}", cost, score))
        groups[f"group{index}"] = options
    return groups


@pytest.mark.parametrize("collinear", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_one_limit_equals_brute_force(seed, collinear):
    groups = _instance(seed, collinear=collinear)
    everything = _everything(groups)
    cheapest = min(cost for cost, _ in everything)
    for limit in range(cheapest, cheapest + 30, 3):
        best = min((score, cost) for cost, score in everything if cost <= limit)
        found = allocate(groups, limit)
        assert (found.score, found.cost) == pytest.approx(best)
    with pytest.raises(InfeasibleError):
        allocate(groups, cheapest - 1)


@pytest.mark.parametrize("seed", range(40))
def test_score_limit_equals_brute_force(seed):
    groups = _instance(seed)
    everything = _everything(groups)
    lowest = min(score for _, score in everything)
    for limit in range(int(lowest), int(lowest) + 40, 7):
        best = min(cost for cost, score in everything if score <= limit)
        assert allocate_for_score(groups, limit).cost == best


@pytest.mark.parametrize("seed", range(40))
def test_frontier_equals_brute_force_and_hull_lies_on_it(seed):
    groups = _instance(seed)
    everything = sorted(set(_everything(groups)))
    undominated, lowest = [], float("inf")
    for cost, score in everything:
        if score < lowest:
            undominated.append((cost, score))
            lowest = score
    found = [(point.cost, point.score) for point in frontier(groups)]
    assert found == undominated
    hull = [(point.cost, point.score) for point in supported_frontier(groups)]
    assert hull[0] == undominated[0]
    assert hull[-1] == undominated[-1]
    assert set(hull) <= set(undominated)
