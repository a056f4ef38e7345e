from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.numerics import packing

widths = st.integers(2, 8)
sizes = st.integers(1, 70)


def random_codes(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@settings(max_examples=150, deadline=None)
@given(bits=widths, rows=sizes, columns=sizes, seed=st.integers(0, 2**31))
def test_every_order_is_inverted(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    kept = codes.clone()
    assert torch.equal(packing.unpack_bits(packing.pack_bits(codes, bits), bits, columns), codes)
    assert torch.equal(packing.unpack_gptq(packing.pack_gptq(codes, bits), bits, columns), codes)
    assert torch.equal(
        packing.unpack_gptq_zeros(packing.pack_gptq_zeros(codes, bits), bits, rows), codes
    )
    assert torch.equal(
        packing.unpack_compressed_tensors_zeros(
            packing.pack_compressed_tensors_zeros(codes, bits), bits, rows
        ),
        codes,
    )
    nibbles = codes & 0xF
    assert torch.equal(
        packing.unpack_nibbles(packing.pack_nibbles(nibbles), (rows, columns)), nibbles
    )
    assert torch.equal(codes, kept)


@settings(max_examples=60, deadline=None)
@given(eighths=st.integers(1, 9), columns=sizes, seed=st.integers(0, 2**31))
def test_awq_order_is_inverted(eighths, columns, seed):
    codes = random_codes(8 * eighths, columns, 4, seed)
    words = packing.pack_awq(codes)
    assert words.shape == (columns, eighths)
    assert torch.equal(packing.unpack_awq(words), codes)


@settings(max_examples=150, deadline=None)
@given(bits=widths, rows=sizes, columns=sizes, seed=st.integers(0, 2**31))
def test_dense_stream_equals_big_integer_arithmetic(bits, rows, columns, seed):
    codes = random_codes(rows, columns, bits, seed)
    words = packing.pack_bits(codes, bits)
    for row in {0, rows - 1}:
        stream = sum(code << (i * bits) for i, code in enumerate(codes[row].tolist()))
        found = sum((w & 0xFFFFFFFF) << (32 * i) for i, w in enumerate(words[row].tolist()))
        assert found == stream


@settings(max_examples=100, deadline=None)
@given(bits=widths, rows=sizes, columns=sizes, seed=st.integers(0, 2**31))
def test_same_words_as_compressed_tensors(bits, rows, columns, seed):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(rows, columns, bits, seed)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    theirs = helpers.pack_to_int32(signed, bits)
    assert torch.equal(packing.pack_compressed_tensors(codes, bits), theirs)
    zeros = helpers.pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(packing.pack_compressed_tensors_zeros(codes, bits), zeros)
    unpacked = helpers.unpack_from_int32(theirs, bits, codes.shape)
    assert torch.equal(unpacked, signed)
