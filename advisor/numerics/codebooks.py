"""Codebooks of 4- and 8-bit floating point types."""

from __future__ import annotations

import torch
from torch import Tensor

NF4_VALUES: tuple[float, ...] = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat4: quantiles of a normal distribution, in rising order.

Reference: QLoRA, arXiv:2305.14314, appendix E.
"""

FP4_VALUES: tuple[float, ...] = tuple(
    sign * value / 12.0
    for sign in (1.0, -1.0)
    for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
)
"""bitsandbytes' FP4 by bit pattern (sign, two exponent bits, one mantissa bit), largest is 1.

Not the E2M1 of the OCP micro-scaling formats: its subnormal is 1/192, not 1/12.
"""

E4M3_LARGEST = 448.0
"""Largest finite value of float8_e4m3fn."""


def codebook(weight: str) -> Tensor:
    """Return the values of a 4-bit type by code, float32, shape [16].

    Args:
        weight: ``nf4`` or ``fp4``.
    """
    return torch.tensor({"nf4": NF4_VALUES, "fp4": FP4_VALUES}[weight], dtype=torch.float32)


def encode_e4m3(values: Tensor) -> Tensor:
    """Return the bit patterns (uint8) of the nearest float8_e4m3fn; larger values saturate."""
    clamped = values.to(torch.float32).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return clamped.to(torch.float8_e4m3fn).view(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Return the float32 values of float8_e4m3fn bit patterns (uint8)."""
    return codes.view(torch.float8_e4m3fn).to(torch.float32)
