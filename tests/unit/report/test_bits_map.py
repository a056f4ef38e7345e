"""The map of a mixture tells types of equal bits apart."""

from __future__ import annotations

import re

from advisor.report.bits_map import bits_map

SCHEMES = {
    "model.layers.0.self_attn.q_proj": "nvfp4",
    "model.layers.0.self_attn.o_proj": "gptq-int4-g32-sym",
    "model.layers.0.mlp.up_proj": "nvfp4-anvfp4",
    "model.layers.0.mlp.down_proj": "rtn-fp8-gch-afp8",
    "model.layers.1.mlp.up_proj": "gptq-int8-gch-sym",
    "model.layers.1.mlp.down_proj": "bf16",
}


def test_equal_bits_of_other_types_have_other_colours():
    drawn = bits_map(SCHEMES, "compressed-tensors")
    cells = dict(re.findall(r'fill="(hsl\([^)]*\))"><title>[^:]*: ([^,]+),', drawn))
    colours = {scheme: colour for colour, scheme in cells.items()}
    assert colours.keys() == set(SCHEMES.values())
    hues = {scheme: colour.split()[0] for scheme, colour in colours.items()}
    assert hues["nvfp4"] != hues["gptq-int4-g32-sym"]
    assert hues["nvfp4-anvfp4"] not in (hues["nvfp4"], hues["gptq-int4-g32-sym"])
    assert hues["nvfp4-anvfp4"] == hues["rtn-fp8-gch-afp8"] != hues["gptq-int8-gch-sym"]
    assert hues["bf16"] == hues["gptq-int8-gch-sym"]
    for scheme, bits in (("nvfp4", "4.50"), ("nvfp4-anvfp4", "4.50"), ("rtn-fp8-gch-afp8", "8.00")):
        assert f">{scheme}, {bits} bits<" in drawn
