"""GGUF's block types: fields of a block, and the bytes that llama.cpp lays them out in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class BlockType:
    """One type of block.

    A value is ``d · s[g] · (code - center) - dmin · m[g]``; types without scales of groups have
    ``s = 1`` and ``m = 1`` (and store the minimum with its sign changed).

    Attributes:
        weights: Weights of a block.
        size: Bytes of a block.
        width: Weights of a group, which share ``s`` and ``m``.
        bits: Bits of a code.
        center: The code that stands for zero, before the minimum.
        scale_levels: Largest magnitude of ``s``; 0 where groups have none.
        has_minimum: Whether blocks store a minimum.
    """

    weights: int
    size: int
    width: int
    bits: int
    center: int = 0
    scale_levels: int = 0
    has_minimum: bool = False


BLOCK_TYPES: dict[str, BlockType] = {
    "q4_0": BlockType(32, 18, 32, 4, 8),
    "q4_1": BlockType(32, 20, 32, 4, has_minimum=True),
    "q5_0": BlockType(32, 22, 32, 5, 16),
    "q5_1": BlockType(32, 24, 32, 5, has_minimum=True),
    "q8_0": BlockType(32, 34, 32, 8, 128),
    "iq4_nl": BlockType(32, 18, 32, 4),
    "q2_k": BlockType(256, 84, 16, 2, scale_levels=15, has_minimum=True),
    "q3_k": BlockType(256, 110, 16, 3, 4, scale_levels=32),
    "q4_k": BlockType(256, 144, 32, 4, scale_levels=63, has_minimum=True),
    "q5_k": BlockType(256, 176, 32, 5, scale_levels=63, has_minimum=True),
    "q6_k": BlockType(256, 210, 16, 6, 32, scale_levels=128),
}
"""Reference: llama.cpp, ggml-common.h and the ``quantize_row_*_ref`` functions of ggml-quants.c."""

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def get_block_type(name: str) -> BlockType:
    """Return a block type.

    Raises:
        InputError: Unknown; names the nearest known one.
    """
    if name not in BLOCK_TYPES:
        raise InputError(
            f"{name!r} is no GGUF block type: {', '.join(BLOCK_TYPES)} are."
            f"{did_you_mean(name, BLOCK_TYPES)}"
        )
    return BLOCK_TYPES[name]


def code_values(name: str) -> Tensor:
    """Return what each code stands for, float32 [2^bits], before scale and minimum."""
    if name == "iq4_nl":
        return torch.tensor(IQ4_NL_VALUES, dtype=torch.float32)
    kind = get_block_type(name)
    return torch.arange(2**kind.bits, dtype=torch.float32) - kind.center


def pack_blocks(name: str, codes: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Return the bytes of a weight.

    Args:
        name: Block type.
        codes: uint8 [out, in]; ``in`` is a multiple of the block's weights.
        fields: ``d`` and, where the type has a minimum, ``dmin``: float32 [out, blocks], exact in
            float16; where groups have scales, ``s`` and ``m``: int16 [out, groups].

    Returns:
        uint8 [out, blocks · size].
    """
    kind = get_block_type(name)
    rows = codes.shape[0]
    q = codes.reshape(-1, kind.weights)
    d = _half_bytes(fields["d"])
    dmin = _half_bytes(fields["dmin"]) if kind.has_minimum else d[:, :0]
    groups = kind.weights // kind.width
    s = fields["s"].reshape(-1, groups) if kind.scale_levels else torch.zeros(len(q), 0)
    m = fields["m"].reshape(-1, groups) if kind.scale_levels and kind.has_minimum else s
    if name in ("q4_0", "q4_1", "iq4_nl"):
        parts = [d, dmin, _nibbles(q, 32)]
    elif name in ("q5_0", "q5_1"):
        high = _join((q >> 4).view(-1, 4, 8).unbind(2), 1)
        parts = [d, dmin, high, _nibbles(q & 15, 32)]
    elif name == "q8_0":
        parts = [d, q ^ 128]
    elif name == "q2_k":
        parts = [_join((s.to(torch.uint8), m.to(torch.uint8)), 4), _quarters(q), d, dmin]
    elif name == "q3_k":
        high = _join((q >> 2).view(-1, 8, 32).unbind(1), 1)
        parts = [high, _quarters(q & 3), _pack_signed_scales(s), d]
    elif name == "q4_k":
        parts = [d, dmin, _pack_scales(s, m), _nibbles(q, 64)]
    elif name == "q5_k":
        high = _join((q >> 4).view(-1, 8, 32).unbind(1), 1)
        parts = [d, dmin, _pack_scales(s, m), high, _nibbles(q & 15, 64)]
    else:
        parts = [_nibbles(q & 15, 128), _quarters(q >> 4), s.to(torch.int8).view(torch.uint8), d]
    return torch.cat(parts, 1).view(rows, -1).contiguous()


def unpack_blocks(name: str, blocks: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return codes and fields of a weight's bytes, the inverse of :func:`pack_blocks`.

    Args:
        name: Block type.
        blocks: uint8 [out, blocks · size].
    """
    kind = get_block_type(name)
    rows = blocks.shape[0]
    rest = blocks.reshape(-1, kind.size)

    def take(size: int) -> Tensor:
        nonlocal rest
        part, rest = rest[:, :size], rest[:, size:]
        return part

    fields: dict[str, Tensor] = {}

    def halves(*names: str) -> None:
        for field in names:
            fields[field] = take(2).contiguous().view(torch.float16).float().view(rows, -1)

    if not kind.scale_levels:
        halves("d", *(["dmin"] if kind.has_minimum else []))
        if name == "q8_0":
            codes = take(32) ^ 128
        else:
            high = _bits(take(4), 8, 1).permute(0, 2, 1) if kind.bits == 5 else None
            codes = _from_nibbles(take(16), 32)
            if high is not None:
                codes = codes | (high.reshape(-1, 32) << 4)
    elif name == "q2_k":
        scales = take(16)
        fields["s"], fields["m"] = scales & 15, scales >> 4
        codes = _from_quarters(take(64))
        halves("d", "dmin")
    elif name == "q3_k":
        high = _bits(take(32), 8, 1).reshape(-1, 256)
        codes = _from_quarters(take(64)) | (high << 2)
        fields["s"] = _unpack_signed_scales(take(12))
        halves("d")
    elif name == "q6_k":
        codes = _from_nibbles(take(128), 128) | (_from_quarters(take(64)) << 4)
        fields["s"] = take(16).contiguous().view(torch.int8)
        halves("d")
    else:
        halves("d", "dmin")
        fields["s"], fields["m"] = _unpack_scales(take(12))
        high = _bits(take(32), 8, 1).reshape(-1, 256) << 4 if name == "q5_k" else None
        codes = _from_nibbles(take(128), 64)
        codes = codes if high is None else codes | high
    for field in ("s", "m"):
        if field in fields:
            fields[field] = fields[field].to(torch.int16).reshape(rows, -1)
    return codes.reshape(rows, -1).contiguous(), fields


def _half_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16).reshape(-1, 1).view(torch.uint8)


def _join(parts: Sequence[Tensor], bits: int) -> Tensor:
    """Put fields of some bits into bytes, the first lowest."""
    joined = torch.zeros_like(parts[0])
    for number, part in enumerate(parts):
        joined = joined | (part << (bits * number))
    return joined


def _bits(packed: Tensor, count: int, bits: int) -> Tensor:
    """Undo :func:`_join`: [n, k] to [n, count, k]."""
    mask = 2**bits - 1
    return torch.stack([(packed >> (bits * number)) & mask for number in range(count)], 1)


def _nibbles(q: Tensor, span: int) -> Tensor:
    """Join the halves of every run of ``span`` codes."""
    return _join(q.view(len(q), -1, 2, span // 2).unbind(2), 4).reshape(len(q), -1)


def _from_nibbles(packed: Tensor, span: int) -> Tensor:
    runs = packed.reshape(-1, span // 2)
    return _bits(runs, 2, 4).reshape(len(packed), -1)


def _quarters(q: Tensor) -> Tensor:
    """Join the quarters of every run of 128 codes."""
    return _join(q.view(len(q), 2, 4, 32).unbind(2), 2).reshape(len(q), -1)


def _from_quarters(packed: Tensor) -> Tensor:
    return _bits(packed.reshape(-1, 32), 4, 2).reshape(len(packed), -1)


def _pack_scales(s: Tensor, m: Tensor) -> Tensor:
    """Eight scales and eight minimums of 6 bits in 12 bytes."""
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4 << 6)
    second = m[:, :4] | (m[:, 4:] >> 4 << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _unpack_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = torch.cat([first & 63, (third & 15) | (first >> 6 << 4)], 1)
    m = torch.cat([second & 63, (third >> 4) | (second >> 6 << 4)], 1)
    return s, m


def _pack_signed_scales(s: Tensor) -> Tensor:
    """Sixteen scales of 6 bits, counted from -32, in 12 bytes."""
    raised = (s + 32).to(torch.uint8)
    low = (raised[:, :8] & 15) | ((raised[:, 8:] & 15) << 4)
    high = _join((raised >> 4).view(-1, 4, 4).unbind(1), 2)
    return torch.cat([low, high], 1)


def _unpack_signed_scales(packed: Tensor) -> Tensor:
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], 1)
    high = _bits(packed[:, 8:], 4, 2).reshape(-1, 16)
    return (low | (high << 4)).to(torch.int16) - 32
