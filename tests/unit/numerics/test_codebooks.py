from __future__ import annotations

import pytest
import torch

from advisor.numerics.codebooks import codebook, decode_e4m3, encode_e4m3


@pytest.mark.parametrize("weight", ["nf4", "fp4"])
def test_same_table_as_bitsandbytes(weight):
    functional = pytest.importorskip("bitsandbytes.functional")
    theirs = functional.get_4bit_type(weight, device="cpu")
    assert torch.equal(codebook(weight), theirs)


def test_e4m3_saturates_and_rounds_to_even():
    values = torch.tensor([448.0, 1e6, -500.0, 17.0, 19.0, 2.0**-9, 2.0**-10, 0.0])
    decoded = decode_e4m3(encode_e4m3(values))
    assert decoded.tolist() == [448.0, 448.0, -448.0, 16.0, 20.0, 2.0**-9, 0.0, 0.0]


def test_e4m3_values_are_fixed_points():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # the two NaN patterns
    assert torch.equal(encode_e4m3(decode_e4m3(codes)), codes)
