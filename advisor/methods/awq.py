"""AWQ: salient input channels scaled up before rounding, searched in closed form."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods import rtn
from advisor.methods.checks import group_width, prepare_weight, require_statistics
from advisor.numerics.linear_algebra import quadratic_rows
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

_SMALLEST_SCALE = 1e-4


def search_scales(
    weights: Sequence[Tensor],
    statistics: LayerStatistics,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> Tensor:
    """Return the factor by which each weight column is multiplied and its input divided.

    Tries s = mean|x|^alpha for ``scale_steps`` values of alpha from 0 to 1 and keeps the one with
    the least output error Σ tr(ΔW H ΔWᵀ), ΔW = Q(W s) / s - W, with Q the rounding of the scheme.
    No forward pass is needed: H holds all that the error depends on. alpha = 0 is among them, so
    the error is never above that of plain rounding.

    Args:
        weights: The linears that share the inputs, each [out, in]; not modified.
        statistics: Of the inputs before scaling.
        scheme: Integer scheme per channel or group.
        settings: ``scale_steps`` and rounding of scales; clipping is searched afterwards, by
            :func:`quantize`.

    Returns:
        float32 [in], positive, sqrt(max * min) = 1 over live inputs; 1 for inputs that were never
        active.

    Raises:
        InputError: A weight, the statistics or the scheme cannot be used.

    Reference: AWQ, arXiv:2306.00978, section 3.2, equations 4 and 5.

    Differs from the paper: the error is exact over all calibration tokens, through H, instead of
    measured by forward passes over some; it is that of the linears themselves, not of the block
    around them.
    """
    if not weights:
        raise InputError("the scale search needs at least one weight, but got none.")
    if settings.scale_steps < 1:
        raise InputError(f"scale_steps must be at least 1, but got {settings.scale_steps}.")
    _check(scheme)
    stacked = torch.cat([prepare_weight(weight, [scheme]) for weight in weights])
    found = require_statistics(statistics, stacked.shape[1], "awq")
    second_moment = found.second_moment.to(device=stacked.device, dtype=torch.float32)
    magnitude = (found.absolute_sum.to(stacked) / found.tokens).to(torch.float32)
    unclipped = _without_clip(settings)
    best_scales, best_error = torch.ones_like(magnitude), float("inf")
    for alpha in torch.linspace(0.0, 1.0, settings.scale_steps).tolist():
        scales = _normalised_power(magnitude, alpha)
        rounded = rtn.quantize_integers(stacked * scales, scheme, unclipped).dequantize()
        delta = rounded.div_(scales).sub_(stacked)
        error = float(quadratic_rows(delta, second_moment).double().sum())
        if error < best_error:
            best_scales, best_error = scales, error
    return best_scales


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Round a weight whose columns were already multiplied by the searched scales.

    With ``settings.clip == "mse"`` ranges are shrunk where that lowers the group's share of the
    output error, ΔW_g H_gg ΔW_gᵀ with the block of H of the group's inputs; a row keeps its
    clipped ranges only if its error over all groups together is lower too.

    Args:
        weight: The folded weight [out, in], any floating type; not modified.
        statistics: Of the inputs after they were divided by the scales; needed for clipping.
        scheme: Integer scheme per channel or group.
        settings: Clip search and rounding of scales.

    Raises:
        InputError: The weight, the statistics or the scheme cannot be used.

    Reference: AWQ, arXiv:2306.00978, section 3.2; the clip search is the authors' code's.

    Differs from that code: all tokens count, through H, and rows that clipping makes worse as a
    whole are left as they are.
    """
    _check(scheme)
    values = prepare_weight(weight, [scheme])
    plain = rtn.quantize_integers(values, scheme, _without_clip(settings))
    if settings.clip == "none":
        return plain
    found = require_statistics(statistics, values.shape[1], "awq with clipping")
    second_moment = found.second_moment.to(device=values.device, dtype=torch.float32)
    width = group_width(scheme, values.shape[1])
    blocks = _diagonal_blocks(second_moment, width)

    def group_error(errors: Tensor) -> Tensor:
        return torch.bmm(blocks, errors).mul_(errors).sum(dim=1, keepdim=True)

    clipped = rtn.quantize_integers(values, scheme, settings, loss=group_error)
    before = quadratic_rows(plain.dequantize() - values, second_moment)
    after = quadratic_rows(clipped.dequantize() - values, second_moment)
    better = (after < before).unsqueeze(1)
    zero_points: Tensor | None = None
    if plain.zero_points is not None and clipped.zero_points is not None:
        zero_points = torch.where(better, clipped.zero_points, plain.zero_points)
    return QuantizedWeight(
        scheme=scheme,
        codes=torch.where(better, clipped.codes, plain.codes),
        scales=torch.where(better, clipped.scales, plain.scales),
        zero_points=zero_points,
    )


def _normalised_power(magnitude: Tensor, alpha: float) -> Tensor:
    """Return magnitude^alpha with sqrt(max * min) = 1 over live inputs, and 1 for the others."""
    live = magnitude > 0
    if not bool(live.any()):
        return torch.ones_like(magnitude)
    scales = magnitude.pow(alpha).clamp(min=_SMALLEST_SCALE)
    active = scales[live]
    scales = scales / (active.max() * active.min()).sqrt()
    return torch.where(live, scales, torch.ones_like(scales))


def _diagonal_blocks(second_moment: Tensor, width: int) -> Tensor:
    """Return the blocks of H on its diagonal, [groups, width, width]."""
    groups = second_moment.shape[0] // width
    tiles = second_moment.view(groups, width, groups, width)
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _without_clip(settings: QuantizationSettings) -> QuantizationSettings:
    """Return the settings with clipping off."""
    return dataclasses.replace(settings, clip="none")


def _check(scheme: Scheme) -> None:
    """Reject schemes that are not integer grids per channel or group."""
    if not scheme.is_integer or scheme.granularity not in ("channel", "group"):
        raise InputError(
            f"awq stores int2 to int8 per channel or group, but got scheme {scheme}. "
            "Use for example awq-int4-g128-asym."
        )
