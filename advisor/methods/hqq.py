"""HQQ: zero points that are not integers, found by half-quadratic splitting; needs no inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.methods.grids import check_scales
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

LP_NORM = 0.7
"""p of the loss's norm: below 1, so that a few outliers of a group count for little."""
FIRST_BETA = 10.0
KAPPA = 1.01
ITERATIONS = 20
"""Settings of the authors' library, which the paper recommends for all models."""
BITS = (2, 3, 4, 5, 6, 8)
"""Widths that the library packs."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to groups with a scale and a real zero point.

    The scale is that of the group's range. The zero point lowers the sum of |W - Q|^p, p = 0.7,
    by alternating between a shrinkage of the errors and a mean; of all iterates each group keeps
    the one of least squared error.

    The zero point is what HQQ optimises, and it is not an integer: rounded to one (as gptq, awq
    and compressed-tensors store it) every point of the grid is a multiple of the scale again, and
    the error is that of plain rounding. So results are written in hqq's own format only.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Not used.
        scheme: ``hqq-intB-gN-asym``.
        settings: Data type of scales and zero points, which codes are chosen with.

    Returns:
        Codes with ``zero_points`` in float32, rounded to the stored data type.

    Raises:
        InputError: The weight or its group size cannot be used, or the scheme is not of that kind.

    Reference: Badri and Shaji, Half-Quadratic Quantization of large machine learning models
    (2023), section "Half-quadratic solver" and the authors' library, ``core/optimize.py``.

    Differs from the library: every group keeps its own best iterate (there the mean |W - Q| of the
    whole weight stops all groups at once); scales and zero points are rounded as stored before
    codes are chosen; ranges below 1e-4 keep their scale. The squared error of weights is not above
    the library's; that of outputs, which a method without inputs does not see, was 0.99, 0.99,
    1.03 and 0.65 times the library's for int2, int3, int4 and int8 g64 (12 linears of
    SmolLM2-135M, geometric means).
    """
    del statistics
    _check(scheme)
    values = prepare_weight(weight, [scheme])
    out_features, in_features = values.shape
    groups = values.view(out_features, -1, int(scheme.group_size or 1))
    levels = float(2 ** int(scheme.bits) - 1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = settings.round_scales((high - low) / levels)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    check_scales(scale, settings)
    zero = _best_zero(groups, scale, -low / scale, levels, settings)
    codes = _codes(groups, scale, zero, levels)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.to(torch.uint8).view(out_features, in_features),
        scales=scale.squeeze(-1),
        zero_points=zero.squeeze(-1),
    )


def _best_zero(
    groups: Tensor, scale: Tensor, first: Tensor, levels: float, settings: QuantizationSettings
) -> Tensor:
    """Return the zero points of least squared error, float32 [out, groups, 1], rounded as stored.

    Args:
        groups: Weights [out, groups, width].
        scale: [out, groups, 1], as stored.
        first: Zero points to start from.
        levels: Largest code.
        settings: Rounding of zero points.
    """
    zero, beta = first, FIRST_BETA
    best, least = settings.round_scales(first), torch.full_like(first, float("inf"))
    for _ in range(ITERATIONS):
        stored = settings.round_scales(zero)
        codes = _codes(groups, scale, stored, levels)
        errors = groups - (codes - stored) * scale
        found = errors.square().mean(-1, keepdim=True)
        better = found < least
        best, least = torch.where(better, stored, best), torch.where(better, found, least)
        zero = (codes - (groups - shrink(errors, beta)) / scale).mean(-1, keepdim=True)
        beta *= KAPPA
    return best


def shrink(errors: Tensor, beta: float) -> Tensor:
    """Return sign(x) · max(|x| - |x|^(p-1) / beta, 0): the proximal step of the norm below 1."""
    magnitude = errors.abs()
    # 0^(p-1) is infinite, and what is subtracted from 0 leaves 0.
    kept = magnitude - magnitude.pow(LP_NORM - 1.0) / beta
    return torch.sign(errors) * kept.clamp(min=0.0)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, levels: float) -> Tensor:
    """Return the codes 0..levels, float32: ``round(w / scale + zero)``, clamped."""
    return torch.round(groups / scale + zero).clamp_(0.0, levels)


def _check(scheme: Scheme) -> None:
    """Reject schemes that are not asymmetric integers in groups."""
    if (
        scheme.granularity != "group"
        or scheme.symmetric is not False
        or int(scheme.bits) not in BITS
        or scheme.activation is not None
    ):
        raise InputError(
            f"hqq stores {', '.join(f'int{bits}' for bits in BITS)} in groups with a zero point "
            f"and 16-bit inputs, but got scheme {scheme}. Use for example hqq-int4-g64-asym."
        )
