"""What must hold of the allocation whatever the scores are."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.search.allocation import Option, allocate, supported_frontier

_option = st.tuples(st.integers(0, 10**7), st.floats(0, 10, allow_nan=False, allow_subnormal=False))
_groups = st.lists(st.lists(_option, min_size=1, max_size=8), min_size=1, max_size=25).map(
    lambda rows: {
        f"group{g}": [Option(f"option{o}", cost, score) for o, (cost, score) in enumerate(row)]
        for g, row in enumerate(rows)
    }
)


def _range(groups):
    low = sum(min(option.cost for option in options) for options in groups.values())
    high = sum(max(option.cost for option in options) for options in groups.values())
    return low, high


@settings(max_examples=80, deadline=None)
@given(_groups, st.floats(0, 1), st.floats(0, 1))
def test_larger_budget_is_never_worse(groups, first, second):
    low, high = _range(groups)
    small, large = sorted((low + first * (high - low), low + second * (high - low)))
    tight, loose = allocate(groups, small), allocate(groups, large)
    assert tight.cost <= small * (1 + 1e-9)
    assert loose.score <= tight.score + 1e-9


@settings(max_examples=60, deadline=None)
@given(_groups, st.floats(0, 1))
def test_never_worse_than_any_uniform_choice(groups, share):
    low, high = _range(groups)
    limit = low + share * (high - low)
    found = allocate(groups, limit)
    for index in range(min(len(options) for options in groups.values())):
        uniform = [options[index] for options in groups.values()]
        if sum(option.cost for option in uniform) <= limit:
            assert found.score <= sum(option.score for option in uniform) + 1e-9


@settings(max_examples=60, deadline=None)
@given(_groups)
def test_more_options_are_never_worse(groups):
    low, high = _range(groups)
    fewer = {name: options[: max(1, len(options) // 2)] for name, options in groups.items()}
    if _range(fewer)[0] <= (low + high) / 2:
        limit = (low + high) / 2
        assert allocate(groups, limit).score <= allocate(fewer, limit).score + 1e-9


@settings(max_examples=60, deadline=None)
@given(_groups)
def test_hull_corners_are_optimal_at_their_cost(groups):
    for point in supported_frontier(groups)[:6]:
        found = allocate(groups, point.cost)
        assert abs(found.score - point.score) <= 1e-9 * (1 + point.score)
