from __future__ import annotations

import pytest
import torch

from advisor.errors import InputError
from advisor.methods import llm_int8, nf4
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.packing import pack_nibbles
from advisor.schemes import parse_scheme

functional = pytest.importorskip("bitsandbytes.functional")
SETTINGS = QuantizationSettings()


def random_weight(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-fp4", "bnb-nf4-dq", "bnb-fp4-dq"])
@pytest.mark.parametrize("shape", [(24, 192), (33, 100), (7, 9)])
def test_four_bit_is_bitsandbytes_bit_for_bit(name, shape):
    weight = random_weight(*shape)
    scheme = parse_scheme(name)
    found = nf4.quantize(weight, None, scheme, SETTINGS)
    packed, state = functional.quantize_4bit(
        weight,
        blocksize=64,
        quant_type=scheme.weight,
        compress_statistics=scheme.double_quantization,
    )
    whole = weight.numel() // 2  # an odd last code leaves half a byte without meaning
    assert torch.equal(pack_nibbles(found.codes)[:whole], packed[:whole])
    assert torch.equal(found.extras["absmax"], state.absmax)
    assert torch.equal(found.extras["quant_map"], state.code)
    if scheme.double_quantization:
        assert torch.equal(found.extras["nested_absmax"], state.state2.absmax)
        assert torch.equal(found.extras["nested_quant_map"], state.state2.code)
        assert torch.equal(found.extras["offset"], state.offset)
        assert int(found.extras["nested_blocksize"]) == 256
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.equal(found.dequantize(torch.bfloat16), theirs)


def test_four_bit_refuses_other_blocks():
    with pytest.raises(InputError, match=r"blocks of 32, 64.*use bnb-nf4-dq, which has"):
        nf4.quantize(random_weight(4, 128), None, parse_scheme("bnb-nf4-g48-dq"), SETTINGS)


def test_llm_int8_is_bitsandbytes_row_maxima():
    weight = random_weight(24, 100)
    weight[5] = 0.0
    found = llm_int8.quantize(weight, None, parse_scheme("llm.int8"), SETTINGS)
    theirs, maxima, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
    rows = [r for r in range(24) if r != 5]
    assert torch.equal(found.codes[rows].int() - 128, theirs[rows].int())
    assert torch.equal(found.extras["SCB"], maxima.float())
    assert bool((found.dequantize()[5] == 0).all())
    torch.testing.assert_close(
        found.dequantize()[rows], functional.int8_vectorwise_dequant(theirs, maxima)[rows]
    )
    assert int(found.codes.min()) >= 1  # -128 is never used


def test_llm_int8_refuses_what_float16_cannot_hold():
    with pytest.raises(InputError, match="above 65504"):
        llm_int8.quantize(torch.full((2, 2), 1e5), None, parse_scheme("llm.int8"), SETTINGS)
