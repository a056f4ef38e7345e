"""int4 weights for FP8 inputs: rounding and GPTQ onto what the kernel really multiplies with.

See :mod:`advisor.numerics.int4_fp8` for that arithmetic.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight, refuse_lost, require_statistics
from advisor.methods.gptq_float import quantize_in_turn
from advisor.methods.grids import check_scales
from advisor.methods.ordering import OrderedFactor, ordered_factor
from advisor.numerics.int4_fp8 import (
    SMALLEST_CHANNEL_SCALE,
    ZERO_POINT,
    dequantize_int4_fp8,
    kernel_scales,
    nearest_codes,
    products,
)
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

_HALF_RANGE = 7.5
"""A symmetric int4 grid covers 2 · max|w| in 15 steps."""
_SHARES = (1.0, 1.0625, 1.125, 0.9375, 0.875)
"""Ranges tried for a group: FP8's neighbours of its scale, since rounding may go either way."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to int4 in groups, to be multiplied with FP8 inputs.

    The group with the largest weight of a row keeps its scale, since the row's other scales are
    relative to it; each other group takes, of a few scales that the kernel can have, the one of
    least squared error (weighted by H's diagonal where there are statistics; under GPTQ by what
    other columns cannot make up for). GPTQ then chooses codes column by column, with these scales.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs; gptq needs them.
        scheme: ``rtn-int4-gN-sym-afp8`` or ``gptq-int4-gN-sym-afp8``.
        settings: GPTQ's damping, ``column_block`` and ``static_groups``; the clip search also
            tries smaller ranges. Scales are rounded as they are stored.

    Raises:
        InputError: The weight, the statistics or the scheme cannot be used.

    Reference: GPTQ, arXiv:2210.17323, Algorithm 1, with scales chosen beforehand.
    """
    _check(scheme)
    values = prepare_weight(weight, [scheme])
    out_features, in_features = values.shape
    width = int(scheme.group_size or 1)
    moment: Tensor | None = None
    if scheme.method == "gptq":
        statistics = require_statistics(statistics, in_features, "gptq")
    if statistics is not None:
        moment = statistics.second_moment.to(device=values.device, dtype=torch.float32)
    groups = values.view(out_features, -1, width)
    importance: Tensor | None = None
    if moment is not None:
        made = _factor(moment, settings) if scheme.method == "gptq" else None
        costs = moment.diagonal() if made is None else made.left_over()
        importance = costs.view(1, -1, width)
    stored = _scales(groups, importance, settings)
    scales, channel = kernel_scales(stored)
    extras: dict[str, Tensor] = {}
    if scheme.method == "gptq" and moment is not None:
        codes, extras = _gptq(values, moment, scales.repeat_interleave(width, 1), channel, settings)
    else:
        codes = nearest_codes(groups, scales.unsqueeze(-1), channel.unsqueeze(-1))
    small = f"scales of channels under FP8 inputs end at {SMALLEST_CHANNEL_SCALE:.1e}"
    refuse_lost(values, lambda: _nearest(groups, stored), small, "Use int4 with 16-bit inputs.")
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.to(torch.uint8).reshape(out_features, in_features).contiguous(),
        scales=stored,
        extras=extras,
    )


def _nearest(groups: Tensor, stored: Tensor) -> Tensor:
    """Return what the nearest codes of groups [out, groups, width] stand for, [out, in]."""
    scales, channel = (part.unsqueeze(-1) for part in kernel_scales(stored))
    codes = nearest_codes(groups, scales, channel)
    return dequantize_int4_fp8(codes.view(len(codes), -1), stored)


def _scales(groups: Tensor, importance: Tensor | None, settings: QuantizationSettings) -> Tensor:
    """Return the scales to store, float32 [out, groups]."""
    whole = settings.store_scales(groups.abs().amax(-1) / _HALF_RANGE)
    whole = torch.where(whole > 0, whole, torch.ones_like(whole) * _smallest(whole))
    check_scales(whole, settings)
    largest = whole.amax(1, keepdim=True)
    leading = torch.zeros_like(whole, dtype=torch.bool).scatter_(
        1, whole.argmax(1, keepdim=True), value=True
    )
    shares = list(_SHARES)
    if settings.clip == "mse":
        shares += torch.linspace(1.0, settings.clip_shrink, settings.clip_steps).tolist()[1:]
    best, least = whole, torch.full_like(whole, float("inf"))
    for share in shares:
        tried = torch.minimum(settings.round_scales(whole * share), largest)
        tried = torch.where(leading, largest, tried)
        scales, channel = (part.unsqueeze(-1) for part in kernel_scales(tried))
        codes = nearest_codes(groups, scales, channel)
        error = (products(codes - ZERO_POINT, scales) * channel - groups).square()
        found = (error if importance is None else error * importance).sum(-1)
        better = found < least
        best, least = torch.where(better, tried, best), torch.where(better, found, least)
    return best


def _smallest(scales: Tensor) -> Tensor:
    """Return the smallest positive scale of each row, or 1: what a group of zeros takes."""
    positive = torch.where(scales > 0, scales, torch.full_like(scales, float("inf")))
    least = positive.amin(1, keepdim=True)
    return torch.where(least.isfinite(), least, torch.ones_like(least))


def _factor(moment: Tensor, settings: QuantizationSettings) -> OrderedFactor:
    """Return H's factor, in the order of work."""
    return ordered_factor(moment, settings.damping, by_activation=settings.static_groups)


def _gptq(
    values: Tensor,
    moment: Tensor,
    scales: Tensor,
    channel: Tensor,
    settings: QuantizationSettings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return GPTQ's codes [out, in], and the damping if it had to be raised.

    Args:
        values: float32 [out, in].
        moment: H, float32 [in, in].
        scales: FP8 scale of every weight, [out, in].
        channel: Scale of each channel, [out, 1].
        settings: Of GPTQ.
    """
    made = _factor(moment, settings)
    order, factor = made.order, made.inverse
    ordered, channels = scales[:, order].t().contiguous(), channel[:, 0]

    def nearest(column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        codes = nearest_codes(column, ordered[index], channels)
        return codes, products(codes - ZERO_POINT, ordered[index]) * channels

    codes = quantize_in_turn(
        values[:, order].t().contiguous(), nearest, factor.factor, settings.column_block
    )
    extras = {"damping": torch.tensor(factor.damping)} if factor.raised else {}
    return codes[torch.argsort(order)].t(), extras


def _check(scheme: Scheme) -> None:
    """Reject what the kernel does not compute."""
    if (
        scheme.method not in ("rtn", "gptq")
        or scheme.weight != "int4"
        or scheme.granularity != "group"
        or not scheme.symmetric
        or scheme.activation_order
    ):
        raise InputError(
            "FP8 inputs go with symmetric int4 weights in groups, rounded or by GPTQ without "
            f"act-order, but got scheme {scheme}. Use gptq-int4-g128-sym-afp8."
        )
