"""Which mixtures of other methods are measured beside the best one."""

from __future__ import annotations

import pytest

from advisor.schemes import parse_scheme
from advisor.search.families import Family
from advisor.search.mixture import Mixture
from advisor.search.refine import _not_far_behind


def mixture(method, score, names):
    assignment = {f"m{index}": parse_scheme(name) for index, name in enumerate(names)}
    return Mixture("mixed-4.5bpw", Family(method, True), assignment, 1000, 4.5, score)


LEADER = mixture("gptq", 0.04, ["nvfp4"] * 4 + ["gptq-int4-g32-sym"] * 4 + ["bf16"] * 2)


@pytest.mark.parametrize(
    ("score", "names", "measured"),
    [
        # the same four modules in NVFP4: what is left says little
        (0.041, ["nvfp4"] * 4 + ["awq-int4-g32-sym"] * 6, False),
        (0.041, ["nvfp4"] * 3 + ["awq-int4-g32-sym"] * 7, True),
        # integers of two methods are never alike, and 16 bits do not count
        (0.041, ["awq-int4-g32-sym"] * 8 + ["bf16"] * 2, True),
        (0.041, ["awq-int8-g32-sym"] * 3 + ["nvfp4"] * 1 + ["bf16"] * 6, True),
        (0.081, ["awq-int4-g32-sym"] * 10, False),
    ],
)
def test_others_are_measured_where_they_may_be_the_answer(score, names, measured):
    other = mixture("awq", score, names)
    assert (other in _not_far_behind([LEADER, other], [LEADER])) is measured
    assert LEADER in _not_far_behind([LEADER, other], [LEADER])
