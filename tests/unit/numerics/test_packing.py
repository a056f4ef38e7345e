from __future__ import annotations

import pytest
import torch

from advisor.errors import InputError
from advisor.numerics import packing


def test_dense_stream_of_three_bits_crosses_words():
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 10] = 0b111  # bits 30, 31 and 32
    words = packing.pack_bits(codes, 3)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == [0xC0000000, 0x1, 0x0]


def test_gptq_words_hold_consecutive_inputs_of_one_output():
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)  # two outputs, eight inputs
    words = packing.pack_gptq(codes, 4)
    assert [w & 0xFFFFFFFF for w in words[0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert words.shape == (1, 2)


def test_gptq_zeros_hold_consecutive_outputs_of_one_group():
    zeros = torch.arange(16, dtype=torch.uint8).view(8, 2)  # eight outputs, two groups
    words = packing.pack_gptq_zeros(zeros, 4)
    assert [w & 0xFFFFFFFF for w in words[:, 0].tolist()] == [0xECA86420, 0xFDB97531]


def test_awq_words_interleave_outputs():
    codes = torch.arange(8, dtype=torch.uint8).view(8, 1)
    word = packing.pack_awq(codes).item() & 0xFFFFFFFF
    # Nibbles from low to high hold outputs 0 2 4 6 1 3 5 7.
    assert word == 0x75316420


@pytest.mark.parametrize(
    ("bits", "rows", "first"),
    [(2, 4, 0b00011011), (3, 10, 0o0123456701), (4, 2, 0x01), (8, 2, 0)],
)
def test_hqq_words_hold_the_first_rows_in_the_highest_bits(bits, rows, first):
    codes = (torch.arange(rows) % 2**bits).to(torch.uint8).view(rows, 1).repeat(1, 3)
    words = packing.pack_hqq(codes, bits)
    assert words[0].tolist() == [first] * 3
    assert words.dtype == (torch.int32 if bits == 3 else torch.uint8)
    assert torch.equal(packing.unpack_hqq(words, bits, rows), codes)


def test_bitsandbytes_bytes_hold_the_first_code_high():
    packed = packing.pack_nibbles(torch.tensor([[1, 2], [3, 4]]))
    assert packed.tolist() == [[0x12], [0x34]]


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"0\.\.7, but got 0\.\.8"):
        packing.pack_bits(torch.tensor([[0, 8]], dtype=torch.uint8), 3)


def test_unsupported_layouts_are_refused():
    codes = torch.zeros(8, 4, dtype=torch.uint8)
    with pytest.raises(InputError, match="2 to 8 bits, but got 9"):
        packing.pack_bits(codes, 9)
    with pytest.raises(InputError, match="multiple of 8, but got 7"):
        packing.pack_awq(codes[:7])
    with pytest.raises(InputError, match="holds 4-bit codes, but got 3"):
        packing.pack_awq(codes, 3)
    with pytest.raises(InputError, match="fill 3 words a row, but got 2"):
        packing.unpack_bits(torch.zeros(1, 2, dtype=torch.int32), 3, 32)
