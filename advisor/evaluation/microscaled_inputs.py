"""Inputs rounded at run time to micro-scaled types and to FP8 in groups, as kernels do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.numerics.codebooks import E4M3_LARGEST, decode_e4m3, encode_e4m3
from advisor.numerics.microscaling import (
    E8M0_BIAS,
    MX_WIDTH,
    NVFP4_WIDTH,
    decode_e8m0,
    local_scales,
    round_e2m1,
    shared_exponents,
)

if TYPE_CHECKING:
    from torch import Tensor

_SMALLEST_MAXIMUM = 1e-10
"""vLLM's lower limit of a group's largest magnitude, against division by zero."""


def simulate_fp8_groups(inputs: Tensor, width: int) -> Tensor:
    """Return inputs rounded to float8 e4m3, one scale per token and ``width`` inputs.

    This is what goes with weights in ``width`` × ``width`` blocks; the scale is the group's
    largest magnitude over 448.

    Args:
        inputs: Shape [..., in], any float type; the last group may be shorter.
        width: Inputs that share a scale.

    Reference: DeepSeek-V3 technical report, arXiv:2412.19437, section 3.3.2.
    """
    count = inputs.shape[-1]
    values = torch.nn.functional.pad(inputs.to(torch.float32), (0, -count % width))
    groups = values.reshape(*values.shape[:-1], -1, width)
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST_MAXIMUM) / E4M3_LARGEST
    rounded = decode_e4m3(encode_e4m3(groups / scales)) * scales
    return rounded.flatten(-2)[..., :count].to(inputs.dtype)


def simulate_mxfp4(inputs: Tensor) -> Tensor:
    """Return inputs rounded to MXFP4: E2M1 with one power of two per 32 inputs of a token.

    As vLLM and compressed-tensors have it, the largest magnitude is first rounded to E2M1's
    precision: from 1.75 times a power of two on, it takes the next exponent.

    Args:
        inputs: Shape [..., in] with ``in`` a multiple of 32, any float type.

    Differs from the OCP specification 1.0, section 6.3, which always rounds the exponent down and
    lets larger values saturate; weights follow that rule.
    """
    groups = _split(inputs, MX_WIDTH, "mxfp4")
    maxima = groups.abs().amax(-1, keepdim=True)
    # 2 / 1.75: what lies in the upper eighth of a binade passes into the next one.
    mantissa, _ = torch.frexp(maxima)
    up = (mantissa >= 0.875).to(torch.int32)
    exponents = (shared_exponents(maxima, "mxfp4") + up).clamp(-E8M0_BIAS, E8M0_BIAS)
    scales = decode_e8m0(exponents + E8M0_BIAS)
    rounded = round_e2m1(groups / scales) * scales
    return rounded.flatten(-2).to(inputs.dtype)


def simulate_mxfp8(inputs: Tensor) -> Tensor:
    """Return inputs rounded to MXFP8: E4M3 with one power of two per 32 inputs of a token.

    As in vLLM, the scale is the smallest power of two with which nothing saturates:
    ``ceil(log2(max |x| / 448))``.

    Args:
        inputs: Shape [..., in] with ``in`` a multiple of 32, any float type.

    Differs from the OCP specification 1.0, section 6.3, which rounds the exponent down and lets
    larger values saturate; weights follow that rule.
    """
    groups = _split(inputs, MX_WIDTH, "mxfp8")
    maxima = groups.abs().amax(-1, keepdim=True)
    mantissa, exponents = torch.frexp(maxima / E4M3_LARGEST)
    exponents = exponents.to(torch.int32) - (mantissa == 0.5).to(torch.int32)
    exponents = torch.where(maxima > 0, exponents, torch.full_like(exponents, -E8M0_BIAS))
    scales = decode_e8m0(exponents.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS)
    rounded = decode_e4m3(encode_e4m3(groups / scales)) * scales
    return rounded.flatten(-2).to(inputs.dtype)


def simulate_nvfp4(inputs: Tensor, input_global_scale: Tensor) -> Tensor:
    """Return inputs rounded to NVFP4: E2M1 with one E4M3 scale per 16 inputs of a token.

    Args:
        inputs: Shape [..., in] with ``in`` a multiple of 16, any float type.
        input_global_scale: The checkpoint's, from calibration: 448 * 6 / max |x|; float32 [1].
    """
    groups = _split(inputs, NVFP4_WIDTH, "nvfp4")
    global_ = input_global_scale.to(inputs.device)
    scales = local_scales(groups.abs().amax(-1, keepdim=True), global_) / global_
    rounded = round_e2m1(groups / scales) * scales
    return rounded.flatten(-2).to(inputs.dtype)


def _split(inputs: Tensor, width: int, kind: str) -> Tensor:
    """Return float32 inputs [..., groups, width]."""
    if inputs.shape[-1] % width:
        raise InputError(
            f"{kind} activations share a scale among {width} inputs, which must divide "
            f"in_features, but got in_features={inputs.shape[-1]}. Leave such modules 16-bit."
        )
    return inputs.to(torch.float32).reshape(*inputs.shape[:-1], -1, width)
