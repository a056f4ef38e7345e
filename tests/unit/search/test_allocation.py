"""The allocation: forced and excluded groups, errors, and time at a real model's size."""

from __future__ import annotations

import math
import random
import time

import pytest

from advisor.errors import InfeasibleError, InputError
from advisor.search.allocation import Option, allocate, restrict

GROUPS = {
    "qkv": [Option("int4", 4, 1.0), Option("int8", 8, 0.1), Option("bf16", 16, 0.0)],
    "mlp": [Option("int4", 40, 2.0), Option("int8", 80, 0.2), Option("bf16", 160, 0.0)],
}


def test_spends_the_limit_where_it_helps_most():
    found = allocate(GROUPS, 84)
    assert found.choice == {"qkv": "int4", "mlp": "int8"}
    assert (found.cost, found.score) == (84, pytest.approx(1.2))


def test_forced_option_and_excluded_group():
    forced = restrict(GROUPS, {"mlp": "int4"}, excluded=["qkv"])
    assert allocate(forced, 1000).choice == {"mlp": "int4"}


def test_unknown_group_and_option_are_named():
    with pytest.raises(InputError, match="lm_head"):
        restrict(GROUPS, {}, excluded=["lm_head"])
    with pytest.raises(InputError, match="int4, int8, bf16"):
        restrict(GROUPS, {"qkv": "int3"})


def test_infeasible_names_the_smallest_cost():
    with pytest.raises(InfeasibleError, match=r"44 in all, more than the limit 43"):
        allocate(GROUPS, 43)


@pytest.mark.parametrize("score", [math.nan, math.inf, -1.0])
def test_scores_that_cannot_be_compared_are_refused(score):
    with pytest.raises(InputError, match="qkv/int4"):
        allocate({"qkv": [Option("int4", 4, score)]}, 10)


@pytest.mark.parametrize("irregular", [0, 1000])
def test_a_real_model_is_solved_fast(irregular):
    """120 groups of 10 options, also where no two costs share a divisor."""
    generator = random.Random(0)
    shapes = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
    groups = {}
    for index in range(120):
        rows, columns = shapes[index % 4]
        groups[f"group{index}"] = [
            Option(
                f"{bits}/{size}",
                rows * columns * (bits / 8 + 2 / size) + generator.randrange(irregular + 1),
                rows * columns * generator.lognormvariate(0, 1) * 4.0**-bits * size**0.3,
            )
            for bits in (2, 3, 4, 6, 8)
            for size in (32, 64)
        ]
    low = sum(min(option.cost for option in options) for options in groups.values())
    began = time.process_time()
    found = allocate(groups, 1.6 * low)
    assert time.process_time() - began < 0.5
    assert 1.599 * low < found.cost <= 1.6 * low
