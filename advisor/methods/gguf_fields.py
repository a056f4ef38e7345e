"""The fields of GGUF blocks: scales and minimums of groups, rounded as a file stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.methods.gguf_fit import (
    Fit,
    best_codes,
    fit_affine,
    fit_scaled,
    nearest_codes,
    refine_groups,
)
from advisor.numerics.gguf_blocks import BlockType, code_values, get_block_type

_LARGEST_FACTOR = 65520.0
"""The least number that float16 rounds to infinity."""
_FACTOR_STEPS = tuple(0.25 * step for step in range(-8, 33))
"""Distances from the largest integer at which a super-block's largest scale is tried."""


def fit_rows(
    values: Tensor, importance: Tensor, name: str, kind: BlockType
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round some rows to the nearest codes of fields that are fitted to an importance.

    Args:
        values: float32 [rows, in].
        importance: Weight of each input's squared error, float32 [in].
        name: Block type.
        kind: The same.

    Returns:
        Codes, uint8 [rows, in], and the block's fields.
    """
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
        codes, fields = _super_blocks(x, w, fit, grid, name)
    else:
        fields = {"d": _stored(fit.scale[:, 0], name)}
        minimum = None
        if kind.has_minimum:
            fields["dmin"] = _stored(-fit.minimum[:, 0], name)
            minimum = -fields["dmin"]
        codes = nearest_codes(
            x, fields["d"][:, None], None if minimum is None else minimum[:, None], grid
        )
    shaped = {field: value.reshape(rows, -1) for field, value in fields.items()}
    return codes.to(torch.uint8).view(rows, -1), shaped


def _super_blocks(
    x: Tensor, w: Tensor, fit: Fit, grid: Tensor, name: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Round the scales and minimums of groups, and fit the factors that a block stores.

    Args:
        x: Weights [blocks, groups, width].
        w: Importance, the same shape.
        fit: Scale and minimum of every group.
        grid: Value of each code.
        name: The block type.
    """
    kind = get_block_type(name)
    signed = not kind.has_minimum
    levels = kind.scale_levels
    codes = nearest_codes(x, fit.scale, None if signed else fit.minimum, grid)
    _stored(fit.scale.abs().amax() / levels, name)
    d, s = _round_scales(fit.scale, levels, (w * grid[codes.long()].square()).sum(2), signed=signed)
    dmin, m = None, None
    if not signed:
        _stored(fit.minimum.abs().amax() / levels, name)
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


def _stored(values: Tensor, name: str) -> Tensor:
    """Round the factors that a fit asks for to float16, and reject those beyond its range."""
    largest = float(values.abs().amax())
    if not largest < _LARGEST_FACTOR:
        raise InputError(
            f"{name} stores factors in float16, up to 65504, but weights here need one of "
            f"{largest:.1e}. Keep this module in 16 bits."
        )
    return _half(values)


def _half(values: Tensor) -> Tensor:
    """Round to float16, as the file stores it, within its range."""
    return values.clamp(-65504, 65504).to(torch.float16).to(torch.float32)
