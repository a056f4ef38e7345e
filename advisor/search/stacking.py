"""Quantize linears that read the same input together: one Cholesky factor, one column loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.methods.awq import search_scales
from advisor.methods.checks import require_statistics
from advisor.methods.registry import quantize, quantize_many
from advisor.numerics.quantized_weight import QuantizedWeight, split_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

_SEARCHED_ROWS = 512
"""Rows that shared scales are searched on, of all weights together."""
_MIN_SCALE, _MAX_SCALE = 1e-4, 1e4


@dataclass(frozen=True, slots=True)
class GroupResult:
    """What one scheme makes of the linears that share an input.

    Attributes:
        weights: One result per linear; under AWQ scaling, of the weights times ``scales``.
        scales: AWQ's scale of every input channel, float32 [in], or None without scaling.
    """

    weights: tuple[QuantizedWeight, ...]
    scales: Tensor | None = None

    def dequantize(self, index: int) -> Tensor:
        """Return the weight that a linear effectively has, in the original channels' units."""
        weight = self.weights[index].dequantize()
        return weight if self.scales is None else weight / self.scales


def quantize_group(
    weights: Sequence[Tensor],
    statistics: LayerStatistics | None,
    schemes: Sequence[Scheme],
    settings: QuantizationSettings,
    *,
    foldable: bool,
    share_scales: bool = False,
) -> list[GroupResult]:
    """Quantize linears that read the same input by every scheme.

    Args:
        weights: Shapes [out_i, in], float32; not modified.
        statistics: Of the shared input.
        schemes: Each is applied to all the weights.
        settings: Shared by all.
        foldable: Whether a producer can take up AWQ's scales; without, AWQ only clips.
        share_scales: Search AWQ's scales once, for a 4-bit grid, and use them for every scheme:
            the search costs ``scale_steps`` times the rounding, and its answer hardly moves with
            the bits, nor with the rows: it looks at a few hundred. For scores, not for final codes.

    Returns:
        One result per scheme, in their order. The codes do not depend on which other schemes and
        which other linears are in the call, except that AWQ searches its scales for all of them.
    """
    plain = [s for s in schemes if is_stackable(s) and not (s.method == "awq" and foldable)]
    done: dict[Scheme, GroupResult] = {}
    if plain:
        heights = [weight.shape[0] for weight in weights]
        stacked = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        for scheme, result in zip(
            plain, quantize_many(stacked, statistics, plain, settings), strict=True
        ):
            done[scheme] = GroupResult(split_rows(result, heights))
    shared: dict[bool | None, Tensor] = {}
    for scheme in schemes:
        if scheme in done:
            continue
        if scheme.method == "awq" and foldable:
            statistics = require_statistics(statistics, weights[0].shape[1], "awq")
            scales = shared.get(scheme.symmetric)
            if scales is None:
                searched = _four_bits(scheme, weights[0].shape[1]) if share_scales else scheme
                judged = _some_rows(weights) if share_scales else weights
                scales = awq_scales(judged, statistics, searched, settings)
                if share_scales:
                    shared[scheme.symmetric] = scales
            done[scheme] = _quantize_scaled(weights, statistics, scheme, settings, scales)
        else:
            done[scheme] = GroupResult(
                tuple(quantize(weight, statistics, scheme, settings) for weight in weights)
            )
    return [done[scheme] for scheme in schemes]


def _quantize_scaled(
    weights: Sequence[Tensor],
    statistics: LayerStatistics,
    scheme: Scheme,
    settings: QuantizationSettings,
    scales: Tensor,
) -> GroupResult:
    """Quantize weights whose columns are multiplied by scales."""
    scaled = scale_inputs(statistics, scales)
    heights = [weight.shape[0] for weight in weights]
    stacked = torch.cat([weight * scales for weight in weights])
    result = quantize(stacked, scaled, scheme, settings)
    return GroupResult(split_rows(result, heights), scales)


def _some_rows(weights: Sequence[Tensor]) -> list[Tensor]:
    """Return evenly spaced rows of weights that share an input, about ``_SEARCHED_ROWS`` in all."""
    step = max(1, sum(len(weight) for weight in weights) // _SEARCHED_ROWS)
    return [weight[::step] for weight in weights]


def _four_bits(scheme: Scheme, in_features: int) -> Scheme:
    """Return the grid that shared scales are searched for."""
    grouped = in_features % 64 == 0
    return replace(
        scheme,
        weight="int4",
        granularity="group" if grouped else "channel",
        group_size=64 if grouped else -1,
    )


def awq_scales(
    weights: Sequence[Tensor],
    statistics: LayerStatistics,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> Tensor:
    """Return AWQ's scales for linears that share an input, float32 [in], within sane limits."""
    return search_scales(weights, statistics, scheme, settings).clamp(_MIN_SCALE, _MAX_SCALE)


def is_stackable(scheme: Scheme) -> bool:
    """Whether weights that share an input may be quantized as one: by rows, or one scale for all.

    NVFP4's global scale must be the same in all linears that an engine fuses, and so should the
    scale of a whole FP8 weight: vLLM rounds fused weights of different scales once more, to the
    largest.
    """
    if scheme.weight in ("mxfp4", "mxfp8", "nvfp4") or scheme.granularity == "tensor":
        return True
    if scheme.method == "gguf":  # blocks lie within rows
        return True
    return scheme.is_integer and scheme.granularity in ("channel", "group")
