"""Affine integer grids: from the range of a group to scale, zero point and codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


def grid_levels(bits: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Return 2^bits - 1 as a float32 tensor of no dimension.

    It is a tensor on the device of the data because CUDA divides by a Python number through its
    reciprocal, which rounds differently from a division by a tensor.
    """
    return torch.tensor(float(2**bits - 1), dtype=torch.float32, device=device)


def affine_grid(
    low: Tensor,
    high: Tensor,
    levels: Tensor,
    *,
    symmetric: bool,
    round_scales: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid that covers a range.

    Args:
        low: Smallest value of each group, float32.
        high: Largest value of each group, same shape.
        levels: Largest code, 2^bits - 1, float32, broadcastable to ``low``.
        symmetric: Whether the zero point is fixed at 2^(bits - 1).
        round_scales: Rounds scales to the data type that they are stored in; it is applied before
            zero points are chosen.

    Returns:
        Scale and zero point, float32, shaped as ``low`` broadcast with ``levels``. A symmetric
        scale is ``2 * max |w| / levels``; an asymmetric grid always holds 0. A group whose scale
        is 0 (all weights zero, or too small for the stored data type) gets scale 1.
    """
    if symmetric:
        scale = 2.0 * torch.maximum(-low, high) / levels
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / levels
    scale = round_scales(scale)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if symmetric:
        return scale, ((levels + 1.0) / 2.0).expand_as(scale)
    zero_point = torch.minimum(torch.round(-low / scale).clamp(min=0.0), levels)
    return scale, zero_point


def quantize_affine(values: Tensor, scale: Tensor, zero_point: Tensor, levels: Tensor) -> Tensor:
    """Return the nearest codes 0..levels, float32: ``round(values / scale) + zero_point``, clamped.

    Ties go to the even multiple of the scale. All arguments broadcast against ``values``.
    """
    codes = torch.div(values, scale).round_().add_(zero_point)
    return torch.minimum(codes.clamp_(min=0.0), levels)


def dequantize_affine(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return ``scale * (codes - zero_point)``, float32."""
    return (codes - zero_point) * scale
