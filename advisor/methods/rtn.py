"""Round to nearest: integer grids per channel or group, and FP8."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.methods.checks import group_width, prepare_weight
from advisor.methods.grids import check_scales, choose_grid
from advisor.numerics.affine import grid_levels, quantize_affine
from advisor.numerics.codebooks import E4M3_LARGEST, encode_e4m3
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Round a weight to the nearest point of its grid.

    The same codes serve schemes whose inputs are quantized at run time (W8A8 with dynamic
    per-token activations): those decide the arithmetic, not the weight's codes.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Their second moment's diagonal weighs the clip search; may be None.
        scheme: int2 to int8 per channel or group, or fp8 per channel, tensor, group or block.
        settings: Clip search and rounding of scales.

    Raises:
        InputError: The weight or its group size cannot be used, or the scheme has no rounding.
    """
    values = prepare_weight(weight, [scheme])
    if scheme.weight == "fp8":
        return round_fp8(values, scheme, settings)
    if not scheme.is_integer or scheme.granularity not in ("channel", "group"):
        raise InputError(
            f"rounding stores int2 to int8 per channel or group, and fp8, but got scheme {scheme}."
        )
    importance = None if statistics is None else statistics.second_moment.diagonal()
    return quantize_integers(values, scheme, settings, importance)


def quantize_integers(
    values: Tensor,
    scheme: Scheme,
    settings: QuantizationSettings,
    importance: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> QuantizedWeight:
    """Round float32 values [out, in] to an integer grid, without any check.

    Args:
        values: Not modified.
        scheme: An integer scheme per channel or group.
        settings: Clip search and rounding of scales.
        importance: Weight of each input in the clip search, float32 [in], or None.
        loss: Replaces the weighted squared error of the clip search: from errors
            [groups, inputs of a group, out] to losses [groups, 1, out].
    """
    out_features, in_features = values.shape
    width = group_width(scheme, in_features)
    # Inputs first, as in GPTQ's column loop, so that both add up errors in the same order.
    groups = values.t().contiguous().view(-1, width, out_features)
    levels = grid_levels(int(scheme.bits), device=values.device)
    scale, zero_point = choose_grid(
        groups,
        levels,
        dim=1,
        symmetric=bool(scheme.symmetric),
        settings=settings,
        importance=None if importance is None else importance.reshape(-1, width, 1),
        loss=loss,
    )
    check_scales(scale, settings)
    codes = quantize_affine(groups, scale, zero_point, levels).to(torch.uint8)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.view(in_features, out_features).t().contiguous(),
        scales=scale[:, 0].t().contiguous(),
        zero_points=None if scheme.symmetric else zero_point[:, 0].t().to(torch.uint8).contiguous(),
    )


def round_fp8(values: Tensor, scheme: Scheme, settings: QuantizationSettings) -> QuantizedWeight:
    """Round float32 values to float8_e4m3fn, scaled so that the largest magnitude is 448."""
    scale = settings.store_scales(_fp8_absolute_maximum(values, scheme) / E4M3_LARGEST)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    check_scales(scale, settings)
    full = spread_scales(scale, scheme, (values.shape[0], values.shape[1]))
    return QuantizedWeight(scheme=scheme, codes=encode_e4m3(values / full), scales=scale)


def spread_scales(scale: Tensor, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """Return the scale of every weight, [out, in], from those of an FP8 scheme."""
    rows, columns = _fp8_tile(scheme, shape)
    full = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return full[: shape[0], : shape[1]]


def _fp8_tile(scheme: Scheme, shape: tuple[int, int]) -> tuple[int, int]:
    """Return the (rows, columns) that share a scale."""
    if scheme.granularity == "tensor":
        return shape
    if scheme.granularity == "block":
        return (int(scheme.group_size or 1),) * 2
    return 1, group_width(scheme, shape[1])


def _fp8_absolute_maximum(values: Tensor, scheme: Scheme) -> Tensor:
    """Return the largest magnitude of each tile."""
    out_features, in_features = values.shape
    rows, columns = _fp8_tile(scheme, (out_features, in_features))
    padded = torch.nn.functional.pad(
        values.abs(), (0, -in_features % columns, 0, -out_features % rows)
    )
    tiles = padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)
    return tiles.amax(dim=(1, 3))
