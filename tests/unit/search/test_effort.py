"""What a quick search leaves out."""

from __future__ import annotations

import pytest

from advisor.errors import InputError
from advisor.schemes import parse_scheme
from advisor.search.effort import FULL, QUICK, effort_named


@pytest.mark.parametrize(
    ("offered", "quick"),
    [
        ("mxfp4 nvfp4 bf16", "nvfp4 bf16"),
        ("mxfp4 gptq-int4-g32-sym bf16", "mxfp4 gptq-int4-g32-sym bf16"),
        ("gptq-int4-g32-sym gptq-int4-g32-asym bf16", "gptq-int4-g32-asym bf16"),
        ("gptq-int4-gch-sym gptq-int4-g64-sym rtn-int4-g32-asym gptq-int8-g32-sym",
         "gptq-int4-gch-sym gptq-int4-g64-sym rtn-int4-g32-asym gptq-int8-g32-sym"),
        ("mxfp4-amxfp4 mxfp4 nvfp4 bf16", "mxfp4-amxfp4 nvfp4 bf16"),
        ("mxfp4-amxfp4 mxfp4 nvfp4-anvfp4 bf16", "mxfp4 nvfp4-anvfp4 bf16"),
    ],
)  # fmt: skip
def test_superfluous_options_are_left_out_of_a_quick_search(offered, quick):
    schemes = [parse_scheme(name) for name in offered.split()]
    assert " ".join(map(str, QUICK.options(schemes))) == quick
    assert FULL.options(schemes) == tuple(schemes)


def test_levels_by_name():
    assert effort_named("quick") is QUICK
    assert QUICK.settings.output_feedback == FULL.settings.output_feedback
    with pytest.raises(InputError, match=r"one of quick, full, but got 'quik'. Did you"):
        effort_named("quik")
