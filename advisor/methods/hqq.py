"""HQQ: zero points that are not integers, by half-quadratic splitting; codes fitted to inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.methods.grids import check_scales
from advisor.methods.real_zeros import fit_grids
from advisor.numerics.quantized_weight import QuantizedWeight, split_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

LP_NORM = 0.7
"""p of the loss's norm: below 1, so that a few outliers of a group count for little."""
BETA = 10.0
ITERATIONS = 20
"""Settings of the authors' library, whose solver keeps beta as it is."""
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
    by alternating between a shrinkage of the errors and a mean, until the mean |W - Q| of the whole
    weight no longer falls.

    The zero point is what HQQ optimises, and it is not an integer: rounded to one (as gptq, awq
    and compressed-tensors store it) every point of the grid is a multiple of the scale again, and
    the error is that of plain rounding. So results are written in hqq's own format only.

    With statistics, that is where codes start from: they make up for each other's errors column by
    column, and with ``settings.descent`` codes, scales and zero points are improved in turn
    (:mod:`advisor.methods.real_zeros`): loaders take all three as they are stored. Error of the
    outputs on other inputs over the library's, which knows no inputs (12 linears of SmolLM2-135M,
    bfloat16 grids, groups of 64, geometric means): 0.27, 0.29, 0.31 and 0.17 for int2, int3, int4
    and int8, with three passes of descent 0.20 and 0.27 for int2 and int4.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs; None, or no tokens: no feedback.
        scheme: ``hqq-intB-gN-asym``.
        settings: Data type of scales and zero points, which codes are chosen with; for codes with
            feedback ``damping``, ``descent`` and its damping, ``output_feedback`` (of a whole G)
            and its damping.

    Returns:
        Codes with ``zero_points`` in float32, rounded to the stored data type.

    Raises:
        InputError: The weight, its group size or the statistics cannot be used, or the scheme is
            not of that kind.

    Reference: Badri and Shaji, Half-Quadratic Quantization of large machine learning models
    (2023), section "Half-quadratic solver" and the authors' library, ``core/optimize.py``.

    Differs from the paper: beta stays, as in the library. Differs from the library: scales and zero
    points are rounded as stored before codes are chosen (in float32 all are the library's); ranges
    below 1e-4 keep their scale.
    """
    known = [] if statistics is None else [statistics]
    return quantize_each([weight], known, scheme, settings)[0]


def quantize_each(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize linears that share their inputs, each with feedback among its own outputs.

    Arguments are :func:`advisor.methods.registry.quantize_each`'s; settings: :func:`quantize`.

    Raises:
        InputError: A weight, the statistics or the scheme cannot be used.
    """
    _check(scheme)
    parts = [prepare_weight(weight, [scheme]) for weight in weights]
    levels = float(2 ** int(scheme.bits) - 1)
    width = int(scheme.group_size or 1)
    grids = [_stored_grid(part.view(len(part), -1, width), levels, settings) for part in parts]
    scale, zero = (torch.cat(fields) for fields in zip(*grids, strict=True))
    if statistics and statistics[0].tokens:
        codes, scale, zero = fit_grids(parts, statistics, (scale, zero), levels, settings, "hqq")
    else:
        values = torch.cat(parts)
        codes = _codes(values.view(len(values), -1, width), scale, zero, levels)
    found = QuantizedWeight(
        scheme=scheme,
        codes=codes.to(torch.uint8).view(len(codes), -1),
        scales=scale,
        zero_points=zero,
    )
    return list(split_rows(found, [len(part) for part in parts]))


def _stored_grid(
    groups: Tensor, levels: float, settings: QuantizationSettings
) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of one weight, float32 [out, groups], rounded as stored."""
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / levels
    stored = settings.store_scales(scale)
    lost = stored == 0  # all weights equal, or nothing beside others
    stored, scale = (torch.where(lost, torch.ones_like(part), part) for part in (stored, scale))
    check_scales(stored, settings)
    zero = settings.round_scales(solve(groups, scale, -low / scale, levels))
    check_scales(zero, settings)
    return stored, zero


def solve(groups: Tensor, scale: Tensor, zero: Tensor, levels: float) -> Tensor:
    """Return the zero points of the half-quadratic solver, float32 [out, groups].

    Args:
        groups: Weights [out, groups, width]; the mean over all of them says when to stop.
        scale: [out, groups].
        zero: Zero points to start from.
        levels: Largest code.
    """
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    least = float("inf")
    for _ in range(ITERATIONS):
        codes = torch.round(groups / scale + zero).clamp_(0.0, levels)
        errors = groups - (codes - zero) * scale
        zero = (codes - (groups - shrink(errors)) / scale).mean(-1, keepdim=True)
        mean = float(errors.abs().mean())
        if mean >= least:
            break
        least = mean
    return zero.squeeze(-1)


def shrink(errors: Tensor) -> Tensor:
    """Return sign(x) · max(|x| - |x|^(p-1) / beta, 0): the proximal step of the norm below 1."""
    magnitude = errors.abs()
    # 0^(p-1) is infinite, and what is subtracted from 0 leaves 0.
    kept = magnitude - magnitude.pow(LP_NORM - 1.0) / BETA
    return torch.sign(errors) * kept.clamp(min=0.0)


def _codes(groups: Tensor, scale: Tensor, zero: Tensor, levels: float) -> Tensor:
    """Return the codes 0..levels, float32 [out, groups, width]: the nearest."""
    steps = groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)
    return torch.round(steps).clamp_(0.0, levels)


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
