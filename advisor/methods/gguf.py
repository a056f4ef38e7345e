"""GGUF's block types and k-quants, fitted to an importance per input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.methods.gguf_fit import (
    Fit,
    best_codes,
    fit_affine,
    fit_scaled,
    nearest_codes,
    refine_groups,
)
from advisor.numerics.gguf_blocks import BlockType, code_values, get_block_type
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.predict.gguf_types import base_type, stored_type

if TYPE_CHECKING:
    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

_FACTOR_STEPS = tuple(0.25 * step for step in range(-8, 33))
"""Distances from the largest integer at which a super-block's largest scale is tried."""
_CHUNK_WEIGHTS = 1 << 22
"""Weights fitted at once, so that the search's copies stay small."""
_SMALLEST_IMPORTANCE = 1e-4
"""Of an input, relative to the mean: an input that calibration never saw still has a weight."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to a GGUF block type, or to the main type of a file type.

    Every group's scale and minimum are a weighted least-squares fit, the weights being the second
    moment of each input; then the scales of a super-block are rounded, and refitted as a whole.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Their second moment's diagonal is the importance; None: all inputs alike.
        scheme: ``gguf-TYPE``. Rows that do not fill a block take llama.cpp's fallback type.
        settings: Not used: scales are float16 in the file.

    Returns:
        Codes whose scheme names the type that is really stored, with the block's fields ``d``,
        ``dmin``, ``s`` and ``m`` in ``extras`` (see :func:`pack_blocks`).

    Raises:
        InputError: The weight cannot be used, or no type fits its rows.

    Reference: llama.cpp, ggml-quants.c (``make_qx_quants``, ``make_qkx3_quants``) and its
    importance matrix.

    Differs from it: the importance is the second moment alone, without the factor
    sqrt(sigma² + w²); more scales are tried; and after the scales of a super-block are rounded,
    every group's neighbouring scales are tried with the minimum fitted to each, and the factors are
    refitted. Error of the outputs over llama.cpp's own, from the same importance, on inputs that
    neither saw (SmolLM2-135M, 12 linears, geometric means): 0.60 to 0.99 for Q4_0 to Q8_0 and
    IQ4_NL, 0.81 to 0.97 for the k-quants.
    """
    del settings
    values = prepare_weight(weight, [scheme])
    importance = None if statistics is None else statistics.second_moment.diagonal()
    return quantize_blocks(values, scheme, importance)


def quantize_blocks(
    values: Tensor, scheme: Scheme, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize float32 values [out, in]; see :func:`quantize`.

    Args:
        values: Not modified.
        scheme: ``gguf-TYPE``.
        importance: Weight of each input's squared error, float32 [in], not negative; or None.
    """
    from advisor.schemes import Scheme as SchemeType

    out_features, in_features = values.shape
    name = stored_type(base_type(scheme.weight), in_features)
    if name == "f16":
        raise InputError(
            f"GGUF blocks hold 32 weights of a row, but in_features={in_features} is no multiple. "
            "Keep this module in 16 bits."
        )
    kind = get_block_type(name)
    spread = torch.ones(in_features) if importance is None else importance.detach().float()
    spread = spread.to(values.device).clamp_min(_SMALLEST_IMPORTANCE * float(spread.mean()) + 1e-30)
    spread = spread / spread.mean()
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    fits = [
        _quantize_rows(values[start : start + rows], spread, name, kind)
        for start in range(0, out_features, rows)
    ]
    codes, fields = _joined(fits)
    return assemble(SchemeType("gguf", name), codes, fields)


def assemble(scheme: Scheme, codes: Tensor, fields: dict[str, Tensor]) -> QuantizedWeight:
    """Return the weight that a block's codes and fields stand for.

    Args:
        scheme: ``gguf-TYPE``, TYPE a block type.
        codes: uint8 [out, in].
        fields: As :func:`advisor.numerics.gguf_blocks.unpack_blocks` returns them.
    """
    kind = get_block_type(scheme.weight)
    groups = kind.weights // kind.width
    scales = fields["d"].repeat_interleave(groups, 1)
    extras = dict(fields)
    if kind.scale_levels:
        scales = scales * fields["s"]
    if kind.has_minimum:
        minimums = fields["dmin"].repeat_interleave(groups, 1)
        extras["minimums"] = minimums * fields["m"] if kind.scale_levels else -minimums
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales,
        codebook=code_values(scheme.weight).to(codes.device),
        extras=extras,
    )


def _joined(fits: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    codes = torch.cat([codes for codes, _ in fits])
    return codes, {name: torch.cat([fields[name] for _, fields in fits]) for name in fits[0][1]}


def _quantize_rows(
    values: Tensor, importance: Tensor, name: str, kind: BlockType
) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize some rows: codes [rows, in] and the block's fields."""
    rows = values.shape[0]
    groups = kind.weights // kind.width
    x = values.reshape(-1, groups, kind.width)
    w = importance.expand(rows, -1).reshape(-1, groups, kind.width)
    grid = code_values(name).to(values.device)
    if kind.has_minimum:
        fit = fit_affine(x, w, 2**kind.bits - 1, above_zero=kind.scale_levels > 0)
    else:
        fit = fit_scaled(x, w, grid)
    if kind.scale_levels:
        codes, fields = _super_blocks(x, w, fit, grid, kind)
    else:
        fields = {"d": _half(fit.scale[:, 0])}
        minimum = None
        if kind.has_minimum:
            fields["dmin"] = _half(-fit.minimum[:, 0])
            minimum = -fields["dmin"]
        codes = nearest_codes(
            x, fields["d"][:, None], None if minimum is None else minimum[:, None], grid
        )
    shaped = {field: value.reshape(rows, -1) for field, value in fields.items()}
    return codes.to(torch.uint8).view(rows, -1), shaped


def _super_blocks(
    x: Tensor, w: Tensor, fit: Fit, grid: Tensor, kind: BlockType
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round the scales and minimums of groups, and fit the factors that a block stores.

    Args:
        x: Weights [blocks, groups, width].
        w: Importance, the same shape.
        fit: Scale and minimum of every group.
        grid: Value of each code.
        kind: The block type.
    """
    signed = not kind.has_minimum
    levels = kind.scale_levels
    codes = nearest_codes(x, fit.scale, None if signed else fit.minimum, grid)
    d, s = _round_scales(fit.scale, levels, (w * grid[codes.long()].square()).sum(2), signed=signed)
    dmin, m = None, None
    if not signed:
        dmin, m = _round_scales(fit.minimum, levels, w.sum(2), signed=False)
    codes, error = best_codes(x, w, d, s, dmin, m, grid)
    for _ in range(2):
        s, m = refine_groups(x, w, (d, dmin), (s, m), grid, levels)
        codes, error = best_codes(x, w, d, s, dmin, m, grid)
        q = grid[codes.long()] * s[:, :, None]
        new_d, new_dmin = _refit(x, w, q, m)
        d2 = _half(new_d)
        dmin2 = None if new_dmin is None else _half(new_dmin)
        codes2, error2 = best_codes(x, w, d2, s, dmin2, m, grid)
        better = error2 < error
        d = torch.where(better, d2, d)
        if dmin is not None and dmin2 is not None:
            dmin = torch.where(better, dmin2, dmin)
        codes = torch.where(better[:, None, None], codes2, codes)
        error = torch.where(better, error2, error)
    fields = {"d": d, "s": s.to(torch.int16)}
    if dmin is not None and m is not None:
        fields |= {"dmin": dmin, "m": m.to(torch.int16)}
    return codes, fields


def _round_scales(
    scales: Tensor, levels: int, weights: Tensor, *, signed: bool
) -> tuple[Tensor, Tensor]:
    """Return a block's factor [blocks] and the integers of its groups [blocks, groups].

    The factor puts the largest scale near the end of the integers; of a few such the one of least
    weighted squared error of the scales is taken. Signed integers run from ``-levels`` to
    ``levels - 1``: the largest takes the negative end.

    Args:
        scales: [blocks, groups].
        levels: Largest integer.
        weights: What an error of each group's scale costs, [blocks, groups].
        signed: Whether there are negative ones.
    """
    largest = scales.amax(1)
    if signed:
        index = scales.abs().argmax(1, keepdim=True)
        largest = -scales.gather(1, index)[:, 0]
    low, high = (-levels, levels - 1) if signed else (0, levels)
    best, integers = _half(largest / levels), torch.zeros_like(scales)
    least = torch.full_like(largest, float("inf"))
    for step in _FACTOR_STEPS:
        factor = _half(largest / (levels + step))
        usable = torch.where(factor == 0, torch.ones_like(factor), factor)[:, None]
        tried = torch.round(scales / usable).clamp(low, high)
        tried = torch.where(factor[:, None] == 0, torch.zeros_like(tried), tried)
        error = (weights * (scales - tried * factor[:, None]).square()).sum(1)
        better = error < least
        best, least = torch.where(better, factor, best), torch.where(better, error, least)
        integers = torch.where(better[:, None], tried, integers)
    return best, integers


def _refit(x: Tensor, w: Tensor, q: Tensor, m: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the factors that fit x ≈ d·q - dmin·m best, by weighted least squares."""
    qq = (w * q.square()).sum((1, 2)).double()
    qx = (w * q * x).sum((1, 2)).double()
    if m is None:
        return torch.where(qq > 0, qx / qq.clamp_min(1e-300), torch.zeros_like(qq)).float(), None
    ones = m[:, :, None].expand_as(x)
    mm = (w * ones.square()).sum((1, 2)).double()
    mx = -(w * ones * x).sum((1, 2)).double()
    qm = -(w * q * ones).sum((1, 2)).double()
    determinant = qq * mm - qm.square()
    solvable = determinant > 1e-12 * qq * mm
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    d = torch.where(solvable, (qx * mm - mx * qm) / safe, qx / qq.clamp_min(1e-300))
    dmin = torch.where(solvable, (mx * qq - qx * qm) / safe, torch.zeros_like(d))
    return d.clamp_min(0).float(), dmin.clamp_min(0).float()


def _half(values: Tensor) -> Tensor:
    """Round to float16, as the file stores it, within its range."""
    return values.clamp(-65504, 65504).to(torch.float16).to(torch.float32)
