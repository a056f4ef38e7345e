"""int4 weights under FP8 inputs: what vLLM's CUTLASS kernel makes of codes and group scales.

The kernel multiplies FP8 by FP8, so every weight must be an FP8 number times a scale of its output
channel. When the checkpoint is loaded a row's group scales become FP8 themselves, relative to the
largest of them, and the products of code and group scale are looked up in a table of FP8 numbers.
Both round to three bits of mantissa, which moves a weight by up to an eighth of itself: codes have
to be chosen for what comes out, not for the scales in the file.

Reference: vLLM, ``quantization/utils/quant_utils.py`` (``convert_bf16_scales_to_fp8``) and CUTLASS,
``mixed_dtype_utils.hpp`` (``packed_scale_t``), read from their sources; not run here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advisor.numerics.codebooks import E4M3_LARGEST, decode_e4m3, encode_e4m3

ZERO_POINT = 8
_HEADROOM = 8.0
"""The largest code is -8: scales are an eighth of FP8's range, so that no product overflows."""
SMALLEST_CHANNEL_SCALE = 1.0 / (E4M3_LARGEST * 512.0)


def kernel_scales(stored: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scales that the kernel computes with.

    Args:
        stored: Group scales of the checkpoint, float32 [out, groups], positive.

    Returns:
        FP8 scales of the groups as float32 [out, groups], at most 56, and the scale of each
        channel, float32 [out, 1].
    """
    channel = (stored.amax(1, keepdim=True) / E4M3_LARGEST).clamp(min=SMALLEST_CHANNEL_SCALE)
    first = decode_e4m3(encode_e4m3(stored / channel))
    return decode_e4m3(encode_e4m3(first / _HEADROOM)), channel * _HEADROOM


def products(steps: Tensor, group_scales: Tensor) -> Tensor:
    """Return the FP8 numbers that stand for codes, before the channel's scale; float32.

    Args:
        steps: Codes less 8, float32, -8 to 7.
        group_scales: From :func:`kernel_scales`, broadcastable to ``steps``.
    """
    return decode_e4m3(encode_e4m3(steps * group_scales))


def nearest_codes(values: Tensor, group_scales: Tensor, channel: Tensor) -> Tensor:
    """Return the codes 0..15, float32, whose products are nearest to values.

    Args:
        values: Weights, float32.
        group_scales: FP8 scales, broadcastable to ``values``; 0 where the kernel loses a group.
        channel: Scales of channels, broadcastable to ``values``.
    """
    scaled = values / channel
    usable = torch.where(group_scales > 0, group_scales, torch.ones_like(group_scales))
    middle = torch.round(scaled / usable).clamp(-ZERO_POINT, ZERO_POINT - 1)
    best, least = middle, (products(middle, group_scales) - scaled).abs()
    for shift in (-1.0, 1.0):
        steps = (middle + shift).clamp(-ZERO_POINT, ZERO_POINT - 1)
        error = (products(steps, group_scales) - scaled).abs()
        better = error < least
        best, least = torch.where(better, steps, best), torch.where(better, error, least)
    return best + ZERO_POINT


def dequantize_int4_fp8(codes: Tensor, stored: Tensor) -> Tensor:
    """Return the weight that the kernel multiplies with, float32 [out, in].

    Args:
        codes: 0..15, [out, in].
        stored: Group scales of the checkpoint, float32 [out, groups].
    """
    group_scales, channel = kernel_scales(stored)
    width = codes.shape[1] // stored.shape[1]
    steps = codes.to(torch.float32) - ZERO_POINT
    return products(steps, group_scales.repeat_interleave(width, 1)) * channel
