"""Number formats of micro-scaled types: E2M1 elements, E8M0 shared scales, NVFP4's two levels."""

from __future__ import annotations

import torch
from torch import Tensor

from advisor.numerics.codebooks import E4M3_LARGEST, decode_e4m3, encode_e4m3

E2M1_VALUES: tuple[float, ...] = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip
"""FP4 by bit pattern: sign, two exponent bits of bias 1, one mantissa bit.

Reference: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
"""
E2M1_LARGEST = 6.0
E8M0_BIAS = 127
MX_WIDTH = 32
"""Elements that share an E8M0 scale."""
NVFP4_WIDTH = 16
"""Elements that share an E4M3 scale."""
MICROSCALED_WIDTHS = {"mxfp4": MX_WIDTH, "mxfp8": MX_WIDTH, "nvfp4": NVFP4_WIDTH}
"""Elements that share a scale, by type."""
ELEMENT_EXPONENTS: dict[str, int] = {"mxfp4": 2, "mxfp8": 8}
"""Exponent of the largest power of two that an element holds: 4 in E2M1, 256 in E4M3."""

_SMALLEST_LOCAL_SCALE = 2.0**-9
"""Smallest positive E4M3: a scale of 0 would lose its group and divide by zero."""


def encode_e2m1(values: Tensor) -> Tensor:
    """Return the bit patterns (uint8) of the nearest E2M1; ties go to the even one.

    Larger values saturate at 6, as the MX specification demands (section 6.3).
    """
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.uint8)
    for code, tie in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0), start=1):
        # A tie belongs to the neighbour with an even code: the upper one for even `code`.
        codes += (magnitude >= tie) if code % 2 == 0 else (magnitude > tie)
    return codes | (torch.signbit(values).to(torch.uint8) << 3)


def round_e2m1(values: Tensor) -> Tensor:
    """Return the E2M1 value nearest to each: what :func:`encode_e2m1`'s patterns stand for.

    Neighbours lie 0.5 apart below 2, 1 below 4 and 2 from there on: each part of a value is rounded
    by itself, in place as far as can be. At ties it is the even pattern, an even multiple of that.
    """
    rest = values.clamp(-E2M1_LARGEST, E2M1_LARGEST)
    found = rest.clamp(-2.0, 2.0)
    rest -= found
    found.mul_(2.0).round_().mul_(0.5)
    middle = rest.clamp(-2.0, 2.0)
    rest -= middle
    found += middle.round_()
    found.add_(rest.mul_(0.5).round_(), alpha=2.0)
    return found.copysign_(values)  # zeros too


def e2m1_codebook(device: torch.device | str = "cpu") -> Tensor:
    """Return E2M1's values by bit pattern, float32, shape [16]."""
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


def shared_exponents(maxima: Tensor, weight: str) -> Tensor:
    """Return the exponents of MX's shared scales, int32, -127 to 127.

    ``floor(log2(max |v|)) - emax``; a block of zeros gets the smallest.

    Args:
        maxima: Largest magnitude of each block, float32, not negative.
        weight: ``mxfp4`` or ``mxfp8`` (E4M3 elements).

    Reference: OCP Microscaling Formats (MX) specification 1.0, section 6.3.
    """
    _, exponents = torch.frexp(maxima.to(torch.float32))
    exponents = exponents.to(torch.int32) - 1 - ELEMENT_EXPONENTS[weight]
    exponents = torch.where(maxima > 0, exponents, torch.full_like(exponents, -E8M0_BIAS))
    return exponents.clamp(-E8M0_BIAS, E8M0_BIAS)


def decode_e8m0(codes: Tensor) -> Tensor:
    """Return 2^(code - 127) as float32; 255 (NaN in the specification) is not expected."""
    # The code is float32's own exponent; a power computed elsewhere need not be exact.
    exponents = codes.to(torch.int32)
    bits = (exponents << 23).masked_fill_(exponents == 0, 1 << 22)  # 2^-127 has no exponent
    return bits.view(torch.float32)


def encode_e8m0(scales: Tensor) -> Tensor:
    """Return the E8M0 codes (uint8) of powers of two, the inverse of :func:`decode_e8m0`."""
    _, exponents = torch.frexp(scales.to(torch.float32))
    return (exponents.to(torch.int32) - 1 + E8M0_BIAS).to(torch.uint8)


def global_scale(largest: Tensor) -> Tensor:
    """Return NVFP4's scale of a whole tensor, float32 [1]: 448 * 6 / max |v|.

    It puts the largest scale of a group at the top of E4M3. Group scales are *divided* by it when
    weights are read. A tensor of zeros gets 1.
    """
    largest = largest.to(torch.float32).reshape(1)
    scale = (E4M3_LARGEST * E2M1_LARGEST) / largest
    return torch.where(torch.isfinite(scale) & (largest > 0), scale, torch.ones_like(scale))


def local_scales(maxima: Tensor, global_: Tensor) -> Tensor:
    """Return NVFP4's group scales as E4M3 values in float32: round(max |v| / 6 * global).

    Args:
        maxima: Largest magnitude of each group, float32.
        global_: From :func:`global_scale`.
    """
    rounded = decode_e4m3(encode_e4m3(maxima / E2M1_LARGEST * global_))
    return rounded.clamp(min=_SMALLEST_LOCAL_SCALE)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Return uint8 [out, in / 2]: the even input in the low nibble, the odd one in the high."""
    pairs = codes.reshape(codes.shape[0], -1, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).contiguous()


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Return uint8 codes [out, in], the inverse of :func:`pack_e2m1`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)
