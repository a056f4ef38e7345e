"""What the Marlin kernel does, in float64 and slowly, written from how its threads read memory.

A warp multiplies tiles of 16 inputs and 64 outputs with ``mma.m16n8k16``: in each of eight blocks
of 8 outputs, thread t holds the inputs 2 (t mod 4) + {0, 1, 8, 9} of the output t div 4. Its codes
are in four words (int4), or eight (int8, FP8), that follow each other; a word's fields are in the
order in which masks take them out, the lower half of a register first.

Reference: ``marlin_template.h`` and ``dequant.h``, as vLLM has them and gptqmodel copied them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
_AWQ_FIELDS = [0, 2, 4, 6, 1, 3, 5, 7]


def _places(bits: int) -> tuple[Tensor, Tensor]:
    """Return the input (0..15) and output (0..63) of each code of a tile, in order of memory."""
    inputs, outputs = [], []
    for thread in range(32):
        for word in range(4 if bits == 4 else 8):
            for field in range(32 // bits):
                if bits == 4:
                    block, half, pair, low = word, field % 4 // 2, field % 2, field // 4
                else:
                    block, half, pair, low = word // 2, word % 2, field % 2, field // 2
                inputs.append(2 * (thread % 4) + 8 * pair + low)
                outputs.append(16 * block + 8 * half + thread // 4)
    return torch.tensor(inputs), torch.tensor(outputs)


def _fields(words: Tensor, bits: int) -> Tensor:
    """Return the fields of words [rows, n], lowest first: int64 [rows, n * 32 / bits]."""
    values = words.to(torch.int64) & 0xFFFFFFFF
    shifts = torch.arange(0, 32, bits)
    return ((values[..., None] >> shifts) & (2**bits - 1)).flatten(1)


def _words(fields: Tensor, bits: int) -> Tensor:
    """Return int32 words of fields, the inverse of :func:`_fields`."""
    shifts = torch.arange(0, 32, bits)
    values = (fields.unflatten(1, (-1, 32 // bits)).to(torch.int64) << shifts).sum(-1)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def _tiles(codes: Tensor, bits: int) -> Tensor:
    """Return codes [in, out] as the kernel reads them."""
    inputs, outputs = _places(bits)
    tiles = codes.unflatten(0, (-1, 16)).unflatten(2, (-1, 64)).permute(0, 2, 1, 3)
    return _words(tiles[:, :, inputs, outputs].flatten(1), bits)


def _codes(tiles: Tensor, bits: int) -> Tensor:
    """Return the codes [in, out] that a tensor of tiles holds."""
    inputs, outputs = _places(bits)
    fields = _fields(tiles, bits).unflatten(1, (-1, 1024))
    codes = torch.empty(*fields.shape[:2], 16, 64, dtype=torch.int64)
    codes[:, :, inputs, outputs] = fields
    return codes.permute(0, 2, 1, 3).flatten(0, 1).flatten(1)


def gptq_repack(words: Tensor, order: Tensor, size_k: int, size_n: int, bits: int) -> Tensor:
    """Return tiles of words [in / codes per word, out], inputs in the order given if any."""
    codes = _fields(words.t(), bits).t()
    assert codes.shape == (size_k, size_n)
    return _tiles(codes[order.long()] if order.numel() else codes, bits)


def awq_repack(words: Tensor, size_k: int, size_n: int, bits: int) -> Tensor:
    """Return tiles of AWQ's words [in, out / 8]."""
    assert bits == 4
    fields = _fields(words, 4).unflatten(1, (-1, 8))
    codes = torch.empty_like(fields)
    codes[:, :, _AWQ_FIELDS] = fields
    return _tiles(codes.reshape(size_k, size_n), 4)


def _lane_order(per_channel: bool) -> Tensor:
    """Return which of 64 outputs each scale belongs to, in order of memory."""
    if not per_channel:  # one thread's eight outputs are 8 apart
        return torch.tensor([8 * h + lane for lane in range(8) for h in range(8)])
    # Per channel scales multiply the results, of which a thread has two neighbours in each block.
    return torch.tensor(
        [
            32 * part + 8 * block + 2 * lane + low
            for part in range(2)
            for lane in range(4)
            for block in range(4)
            for low in range(2)
        ]
    )


def _spread(values: Tensor, order: Tensor) -> Tensor:
    """Return values [groups, out] that lie in an order of 64, in the order of outputs."""
    lanes = values.unflatten(1, (-1, 64))
    result = torch.empty_like(lanes)
    result[:, :, order] = lanes
    return result.flatten(1)


def _zero_points(words: Tensor, bits: int) -> Tensor:
    """Return zero points [groups, out]: word and field say the block of 8 outputs."""
    order = []
    for lane in range(8):
        for word in range(bits // 4):
            for field in range(32 // bits):
                per_half = 16 // bits
                block = per_half * word + field % per_half
                order.append(8 * (2 * block + field // per_half) + lane)
    return _spread(_fields(words, bits), torch.tensor(order))


def _fp4_scales(scales: Tensor) -> Tensor:
    """Return scales [groups, out] of FP4: pairs of groups side by side, eight a thread."""
    if scales.dtype == torch.float8_e8m0fnu:
        values = scales.to(torch.float64)
    else:  # a half without its sign and its lower bits, times 2^7
        halves = (scales.view(torch.uint8).to(torch.int16) << 7).view(torch.float16)
        values = halves.to(torch.float64) / 2**7
    groups, outputs = values.shape
    paired = values.reshape(groups // 2, outputs // 64, 8, 2, 8)  # warp, lane, parity, byte
    blocks = torch.tensor([4 * (b // 4) + 2 * (b % 2) + b % 4 // 2 for b in range(8)])
    result = torch.empty_like(paired)
    result[..., blocks] = paired
    return result.permute(0, 3, 1, 4, 2).reshape(groups, outputs)


def gemm(
    inputs: Tensor, weight: Tensor, scales: Tensor, global_scale: Tensor | None,
    zeros: Tensor | None, index: Tensor | None, order: Tensor | None, workspace: Tensor,
    kind: int, size_m: int, size_n: int, size_k: int,
) -> Tensor:  # fmt: skip
    """Return the product [m, out] in float64."""
    del workspace
    assert inputs.shape == (size_m, size_k)
    exponent, bits = kind & 0xFF, (kind & 0xFF) + (kind >> 8 & 0xFF) + (kind >> 16 & 1)
    codes = _codes(weight, bits)
    assert codes.shape == (size_k, size_n)
    bf16 = inputs.dtype == torch.bfloat16
    if exponent == 2:
        values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], dtype=torch.float64)[codes]
        factors = _fp4_scales(scales)
        if global_scale is not None:
            factors = factors * global_scale.double() / 2.0 ** ((126 if bf16 else 14) - 7)
    else:
        values = codes.to(torch.float64)
        if exponent == 4:
            values = codes.to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
            values = values / 2.0 ** (120 if bf16 else 8)
        elif zeros is None:
            values = values - (kind >> 17 & 0xFFFFFFFF)
        factors = _spread(scales.to(torch.float64), _lane_order(scales.shape[0] == 1))
    width = size_k // factors.shape[0]
    if zeros is not None:
        values = values - _zero_points(zeros, bits).repeat_interleave(width, 0)
    values = values * factors.repeat_interleave(width, 0)
    if order is not None:
        assert index is not None
        assert torch.equal(index.long(), torch.arange(size_k) // width)
        inputs = inputs[:, order.long()]
    return inputs.to(torch.float64) @ values
