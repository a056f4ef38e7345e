"""Choosing the integer grid of a group: its whole range, or the clipped one with least error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.numerics.affine import affine_grid, quantize_affine

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.methods.settings import QuantizationSettings

_USUAL_WIDTH = 64
_FINE = 255
"""Levels from where nothing is gained by a smaller range (0 to 1% of predicted KL)."""


def choose_grid(
    values: Tensor,
    levels: Tensor,
    *,
    dim: int,
    symmetric: bool,
    settings: QuantizationSettings,
    importance: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point for groups of values.

    With ``settings.clip == "mse"`` the range is shrunk in ``clip_steps`` equal steps, and the first
    of those with the least weighted squared error is kept, per group; so the error is never above
    that of the whole range. The last step is :func:`least_share`.

    Args:
        values: float32; ``dim`` runs over the members of a group.
        levels: 2^bits - 1, broadcastable to the shape of values with ``dim`` kept as 1.
        dim: Dimension within the group.
        symmetric: Whether the zero point is fixed.
        settings: Clip search and rounding of scales.
        importance: Weight of each value in the error, broadcastable to ``values``; None for equal
            ones.
        loss: Replaces the weighted squared error: from the errors of all values (which it may
            overwrite) to the loss of each group, with ``dim`` kept as 1.

    Returns:
        Scale and zero point, float32, shaped as ``values`` with ``dim`` kept as 1.

    Raises:
        InputError: Unknown clip search, or scales too small for the data type they are stored in.
    """
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    if settings.clip == "none" or (settings.clip == "mse" and bool((levels >= _FINE).all())):
        return affine_grid(
            low, high, levels, symmetric=symmetric, round_scales=settings.store_scales
        )
    if settings.clip != "mse":
        raise InputError(f"clip must be 'none' or 'mse', but got {settings.clip!r}.")
    best: tuple[Tensor, Tensor, Tensor] | None = None
    span = 1.0 - least_share(levels, values.shape[dim], settings)
    for step, progress in enumerate(torch.linspace(0.0, 1.0, settings.clip_steps).tolist()):
        shrink = 1.0 - progress * span
        scale, zero_point = affine_grid(
            low * shrink,
            high * shrink,
            levels,
            symmetric=symmetric,
            round_scales=settings.round_scales if step else settings.store_scales,
        )
        if loss is not None:
            error = quantize_affine(values, scale, zero_point, levels)
            found = loss(error.sub_(zero_point).mul_(scale).sub_(values))
        else:
            found = _squared_error(values, scale, zero_point, levels, dim, importance)
        if best is None:
            best = (found, scale, zero_point)
            continue
        better = found < best[0]
        best = (
            torch.where(better, found, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, zero_point, best[2]),
        )
    if best is None:
        raise InputError(f"clip_steps must be at least 1, but got {settings.clip_steps}.")
    return best[1], best[2]


def least_share(levels: Tensor, width: int, settings: QuantizationSettings) -> Tensor:
    """Return the smallest share of the range that a clip search tries, shaped as ``levels``.

    1 − (1 − clip_shrink)·2 / bits: with ``clip_shrink`` of a half 0.5, 0.67, 0.75 and 0.8 for 2 to
    5 bits; 1 for 8 bits, which gain nothing. The largest of n normal values is about √(2 ln n)
    deviations from the mean, so that in groups of more than 64 it is less by √(ln 64 / ln n).

    Args:
        levels: 2^bits - 1.
        width: Members of a group.
        settings: ``clip_shrink``.
    """
    share = 1.0 - (1.0 - settings.clip_shrink) * 2.0 / torch.log2(levels + 1.0)
    share = share * math.sqrt(math.log(_USUAL_WIDTH) / math.log(max(width, _USUAL_WIDTH)))
    return torch.where(levels >= _FINE, torch.ones_like(share), share)


def _squared_error(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    levels: Tensor,
    dim: int,
    importance: Tensor | None,
) -> Tensor:
    """Return the weighted squared error of each group, ``dim`` kept as 1.

    Counted in steps of the scale: fewer operations on all values than by way of codes.
    """
    exact = values / scale
    steps = exact.round()
    torch.clamp(steps, -zero_point, levels - zero_point, out=steps)
    error = steps.sub_(exact).square_()
    weighted = error if importance is None else error.mul_(importance)
    return weighted.sum(dim, keepdim=True).mul_(scale.square())


def check_scales(scales: Tensor, settings: QuantizationSettings) -> None:
    """Reject scales that overflowed the data type they are stored in.

    Raises:
        InputError: A scale is not finite.
    """
    if not bool(torch.isfinite(scales).all()):
        raise InputError(
            f"a scale is larger than {settings.scale_dtype} can hold. Use scale_dtype bfloat16."
        )
