"""Weighted least-squares fits of a group's scale and minimum, over a search of start values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.numerics.nearest import Nearest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SYMMETRIC_STEPS = range(-9, 10)
_SYMMETRIC_STEP = 0.1
_AFFINE_STEPS = 20
_AFFINE_LOW, _AFFINE_STEP = -0.9, 0.1
"""llama.cpp tries the largest magnitude (or the span) as code ``levels + step``."""


@dataclass(frozen=True, slots=True)
class Fit:
    """Scale and minimum of every group: a weight is ``scale · q - minimum``, [blocks, groups]."""

    scale: Tensor
    minimum: Tensor


def fit_scaled(x: Tensor, w: Tensor, grid: Tensor) -> Fit:
    """Fit x ≈ scale·q, q of a sorted grid.

    Each step sets the scale so that the largest magnitude falls near the grid's far end, rounds,
    and solves for the scale; the least weighted error wins.

    Args:
        x: Weights [blocks, groups, width].
        w: Importance, the same shape.
        grid: Value of each code, rising; float32.
    """
    index = x.abs().argmax(2, keepdim=True)
    largest = x.gather(2, index)[:, :, 0]
    best_scale = torch.zeros_like(largest)
    best_gain = torch.zeros_like(largest)
    for end in _ends(grid):
        scale = largest / end
        q = _values(x, scale[:, :, None], grid)
        wq = w * q
        numerator, denominator = (wq * x).sum(2), (wq * q).sum(2)
        # The error is Σ w x² less this gain.
        gain = numerator.square() / denominator.clamp_min(1e-30)
        better = (gain > best_gain) & (denominator > 0)
        best_gain = torch.where(better, gain, best_gain)
        best_scale = torch.where(better, numerator / denominator.clamp_min(1e-30), best_scale)
    return Fit(best_scale, torch.zeros_like(best_scale))


def _ends(grid: Tensor) -> Iterator[float]:
    """Yield the values that the largest magnitude is tried as."""
    low, high = float(grid[0]), float(grid[-1])
    if len(grid) > 64:
        # Codes of 8 bits: a few, close to the end.
        yield from (low, high, low * 0.998, high * 0.998)
        return
    share = _SYMMETRIC_STEP * (1.0 if low > -64 else -low / 8)
    for step in _SYMMETRIC_STEPS:
        yield low - step * share
    for step in _SYMMETRIC_STEPS[::3]:
        yield high + step * share


def fit_affine(x: Tensor, w: Tensor, levels: int, *, above_zero: bool) -> Fit:
    """Fit x ≈ scale·q - minimum, q in 0..levels.

    Args:
        x: Weights [blocks, groups, width].
        w: Importance, the same shape.
        levels: Largest code.
        above_zero: Whether the minimum cannot be negative (k-quants store it unsigned).
    """
    low = x.amin(2)
    if above_zero:
        low = low.clamp_max(0)
    span = (x.amax(2) - low).clamp_min(0)
    sum_w, sum_x = w.sum(2), (w * x).sum(2)
    sum_xx = (w * x.square()).sum(2)
    best = torch.full_like(low, float("inf"))
    scale, minimum = span / levels, -low
    for step in range(-1, _AFFINE_STEPS):
        codes = levels if step < 0 else levels + _AFFINE_LOW + _AFFINE_STEP * step
        inverse = codes / span.clamp_min(1e-30)
        q = torch.round((x - low[:, :, None]) * inverse[:, :, None]).clamp_(0, levels)
        wq = w * q
        sum_q, sum_qq, sum_qx = wq.sum(2), (wq * q).sum(2), (wq * x).sum(2)
        determinant = sum_w * sum_qq - sum_q.square()
        safe = determinant.clamp_min(1e-30)
        a = (sum_w * sum_qx - sum_x * sum_q) / safe
        b = (sum_qq * sum_x - sum_q * sum_qx) / safe
        if above_zero:
            only = sum_qx / sum_qq.clamp_min(1e-30)
            a = torch.where(b > 0, only, a)
            b = b.clamp_max(0)
        error = (
            sum_xx + a.square() * sum_qq + b.square() * sum_w
            + 2 * (a * b * sum_q - a * sum_qx - b * sum_x)
        )  # fmt: skip
        better = (error < best) & (determinant > 0) & (a > 0)
        best = torch.where(better, error, best)
        scale = torch.where(better, a, scale)
        minimum = torch.where(better, -b, minimum)
    flat = span <= 0
    return Fit(torch.where(flat, torch.zeros_like(scale), scale), minimum)


def nearest_codes(x: Tensor, scale: Tensor, minimum: Tensor | None, grid: Tensor) -> Tensor:
    """Return the code of each weight, uint8 [blocks, groups, width].

    Args:
        x: Weights [blocks, groups, width].
        scale: [blocks, groups], as stored; where 0, every code is that of zero.
        minimum: [blocks, groups], or None.
        grid: Value of each code, rising.
    """
    shifted = x if minimum is None else x + minimum[:, :, None]
    usable = torch.where(scale == 0, torch.full_like(scale, float("inf")), scale)[:, :, None]
    return _codes(shifted / usable, grid)


def best_codes(
    x: Tensor,
    w: Tensor,
    d: Tensor,
    s: Tensor,
    dmin: Tensor | None,
    m: Tensor | None,
    grid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the codes for a block's stored fields, and its weighted squared error [blocks]."""
    scale = d[:, None] * s
    minimum = None if dmin is None or m is None else dmin[:, None] * m
    codes = nearest_codes(x, scale, minimum, grid)
    values = grid[codes.long()] * scale[:, :, None]
    if minimum is not None:
        values = values - minimum[:, :, None]
    return codes, (w * (values - x).square()).sum((1, 2))


def refine_groups(
    x: Tensor,
    w: Tensor,
    factors: tuple[Tensor, Tensor | None],
    integers: tuple[Tensor, Tensor | None],
    grid: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor | None]:
    """Return better integers of scales and minimums, [blocks, groups], for a block's factors.

    Rounding a scale moves the minimum that goes with it: for the scale's integer and its
    neighbours, the minimum is fitted to the codes that they give and rounded after it.

    Args:
        x: Weights [blocks, groups, width].
        w: Importance, the same shape.
        factors: Factor of scales, [blocks], and of minimums (None: there are none).
        integers: Integers of scales and of minimums.
        grid: Value of each code, rising.
        levels: Largest integer; without minimums scales run from ``-levels`` to ``levels - 1``.
    """
    d, dmin = factors
    s, m = integers
    low, high = (0, levels) if m is not None else (-levels, levels - 1)
    total = w.sum(2).clamp_min(1e-30)

    def minimum_of(integer: Tensor | None) -> Tensor | None:
        return None if integer is None or dmin is None else dmin[:, None] * integer

    def error(scales: Tensor, minimums: Tensor | None) -> Tensor:
        values = _quantized(x, d[:, None] * scales, minimum_of(minimums), grid)
        return (w * (values - x).square()).sum(2)

    best_s, best_m, least = s, m, error(s, m)
    for shift in (0.0, -1.0, 1.0):
        tried = (s + shift).clamp(low, high)
        fitted = m
        if m is not None and dmin is not None:
            usable = torch.where(dmin > 0, dmin, torch.full_like(dmin, float("inf")))[:, None]
            values = _quantized(x, d[:, None] * tried, minimum_of(m), grid)
            excess = (w * (values - x)).sum(2) / total
            fitted = torch.round(m + excess / usable).clamp(0, levels)
        found = error(tried, fitted)
        better = found < least
        best_s = torch.where(better, tried, best_s)
        if best_m is not None and fitted is not None:
            best_m = torch.where(better, fitted, best_m)
        least = torch.where(better, found, least)
    return best_s, best_m


def _quantized(x: Tensor, scale: Tensor, minimum: Tensor | None, grid: Tensor) -> Tensor:
    """Return the values that weights take, [blocks, groups, width]."""
    values = grid[nearest_codes(x, scale, minimum, grid).long()] * scale[:, :, None]
    return values if minimum is None else values - minimum[:, :, None]


def _values(x: Tensor, scale: Tensor, grid: Tensor) -> Tensor:
    usable = torch.where(scale == 0, torch.full_like(scale, float("inf")), scale)
    if _is_even(grid):
        return torch.round(x / usable).clamp_(float(grid[0]), float(grid[-1]))
    return grid[_codes(x / usable, grid).long()]


def _codes(scaled: Tensor, grid: Tensor) -> Tensor:
    """Return the index of the nearest grid value, uint8."""
    if _is_even(grid):
        first = float(grid[0])
        last = float(grid[-1])
        return (torch.round(scaled).clamp_(first, last) - first).to(torch.uint8)
    return Nearest(grid).indices(scaled).to(torch.uint8)


def _is_even(grid: Tensor) -> bool:
    return bool(grid[1] - grid[0] == 1)
