"""Codes, scales and real zero points that make up for each other's errors.

``scale * (code - zero)`` with a zero point that need not be an integer is a line through any two
points: with the grid known, codes are those of integers for the weight moved by ``scale * zero``,
so that GPTQ's column loop and the coordinate descent serve as they are; with the codes known, the
best scale and zero point of a group are the solution of two equations. Both take turns.

Reference: GPTQ, arXiv:2210.17323, Algorithm 1; CDQuant, arXiv:2406.17542, section 3; for rows that
depend on each other YAQA, arXiv:2505.22988, section 4.
Differs from the papers: grids move between passes over the codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from advisor.methods.column_state import ColumnState
from advisor.methods.coupled_descent import take_turns
from advisor.methods.descent import descend
from advisor.methods.descent_steps import Couplings
from advisor.methods.value_feedback import FixedScales, ValueFeedback

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.column_state import Rounding
    from advisor.methods.settings import QuantizationSettings


@dataclass(slots=True)
class GridState:
    """A weight on grids with real zero points, columns (inputs) first.

    Attributes:
        codes: float32 [columns, rows], whole numbers from 0 to ``levels``.
        scales: float32 [groups, rows].
        zeros: float32 [groups, rows].
        levels: Largest code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    levels: float

    def weight(self) -> Tensor:
        """Return the quantized weight, float32 [columns, rows]."""
        return (self.codes - self.spread(self.zeros)) * self.spread(self.scales)

    def rows(self, rows: Tensor) -> GridState:
        """Return a copy of some rows, int64."""
        return GridState(
            self.codes[:, rows], self.scales[:, rows], self.zeros[:, rows], self.levels
        )

    def put(self, rows: Tensor, state: GridState) -> None:
        """Take up what some rows have become."""
        self.codes[:, rows], self.scales[:, rows] = state.codes, state.scales
        self.zeros[:, rows] = state.zeros

    def spread(self, values: Tensor) -> Tensor:
        """Return a value of each group for every column."""
        return values.repeat_interleave(len(self.codes) // len(values), 0)


def fit_grids(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    grid: tuple[Tensor, Tensor],
    levels: float,
    settings: QuantizationSettings,
    method: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose codes with feedback, starting from grids that are known; then improve all.

    Args:
        weights: Of linears that share their inputs, float32 [out_i, in]; not modified.
        statistics: Of each, as :class:`advisor.methods.feedback.Feedback` takes them.
        grid: Scales and zero points of all, one below the other, float32 [out, groups], as stored.
        levels: Largest code.
        settings: ``damping``, ``descent`` and its damping, output feedback; rounding of scales and
            zero points.
        method: Its name, for messages.

    Returns:
        Codes, uint8 [out, in], scales and zero points, float32 [out, groups], as stored.

    Raises:
        InputError: Statistics or settings cannot be used.
    """
    loop = ValueFeedback(statistics, weights, replace(settings, descent=0), method)
    values = torch.cat(list(weights))
    width = values.shape[1] // grid[0].shape[1]
    moved = values + (grid[0] * grid[1]).repeat_interleave(width, 1)
    table = torch.arange(int(levels) + 1, dtype=torch.float32, device=values.device)
    codes, _ = loop.improve(moved, grid[0], table, FixedScales())
    if not settings.descent:
        return codes, *grid
    columns = values.t().contiguous()
    scales, zeros = (part.t().contiguous() for part in grid)
    state = GridState(codes.t().float().contiguous(), scales, zeros, levels)
    couplings = Couplings(loop.damped, len(state.scales))

    def descend_rows(target: Tensor, own: GridState) -> None:
        regrid(target, own, loop.damped, settings)
        choose_codes(target, own, couplings)

    if loop.couples:
        take_turns(columns, state, loop.metrics, settings.descent, descend_rows)
    else:
        for _ in range(settings.descent):
            descend_rows(columns, state)
    return (
        state.codes.t().to(torch.uint8).contiguous(),
        state.scales.t().contiguous(),
        state.zeros.t().contiguous(),
    )


def choose_codes(weight: Tensor, state: GridState, couplings: Couplings) -> None:
    """Lower tr((W - Q) H (W - Q)ᵀ) by one pass over the codes; grids stay.

    Args:
        weight: W, float32 [columns, rows].
        state: Changed.
        couplings: Of a damped H, for the state's groups.
    """
    low = torch.zeros_like(state.scales)
    steps = ColumnState(state.codes, state.scales, low, low + state.levels)
    descend(weight + state.spread(state.scales * state.zeros), steps, couplings, FixedScales(), 1)
    state.codes = steps.steps


def regrid(weight: Tensor, state: GridState, moment: Tensor, rounding: Rounding) -> None:
    """Move the grid of each group in turn to where the error is least; codes stay.

    With D the codes beside a column of -1, the change of (scale, scale x zero) that leaves least of
    the error E solves DᵀHD x = DᵀHE. It is rounded as stored, the scale first and the zero point
    for what the scale has become, and kept where the error is then below what it was.

    Args:
        weight: W, float32 [columns, rows].
        state: Changed.
        moment: H, damped, float32 [columns, columns].
        rounding: Of scales and zero points.
    """
    error = weight - state.weight()
    width = len(weight) // len(state.scales)
    for group in range(len(state.scales)):
        span = slice(group * width, (group + 1) * width)
        codes, inside = state.codes[span], moment[span, span]
        pull = moment[span] @ error
        products = inside @ codes
        sums = inside.sum(1, keepdim=True)
        slope = ((codes * pull).sum(0), -pull.sum(0))
        curvature = ((codes * products).sum(0), -products.sum(0), sums.sum())
        scale, zero = state.scales[group], state.zeros[group]
        new = _best_grid(scale, zero, slope, curvature, rounding)
        change = (new[0] - scale, new[0] * new[1] - scale * zero)
        gain = _gain(change, slope, curvature)
        better = (gain > 0) & (new[0] > 0) & new[0].isfinite() & new[1].isfinite()
        state.scales[group] = torch.where(better, new[0], scale)
        state.zeros[group] = torch.where(better, new[1], zero)
        rise, sink = (torch.where(better, part, torch.zeros_like(part)) for part in change)
        error[span] -= codes * rise - sink


def _best_grid(
    scale: Tensor,
    zero: Tensor,
    slope: tuple[Tensor, Tensor],
    curvature: tuple[Tensor, Tensor, Tensor],
    rounding: Rounding,
) -> tuple[Tensor, Tensor]:
    """Return the stored scale and zero point near those of least error, float32 [rows]."""
    both, mixed, offsets = curvature
    determinant = (both * offsets - mixed.square()).clamp_min(1e-30)
    best = scale + (offsets * slope[0] - mixed * slope[1]) / determinant
    best = torch.where(best > 0, best, scale)
    new = rounding.round_scales(best)
    new = torch.where(new > 0, new, scale)
    offset = scale * zero + (slope[1] - mixed * (new - scale)) / offsets.clamp_min(1e-30)
    return new, rounding.round_scales(offset / new)


def _gain(
    change: tuple[Tensor, Tensor],
    slope: tuple[Tensor, Tensor],
    curvature: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Return by how much a change of scale and offset lowers the error, float32 [rows]."""
    linear = 2 * (change[0] * slope[0] + change[1] * slope[1])
    square = change[0].square() * curvature[0] + change[1].square() * curvature[2]
    return linear - square - 2 * change[0] * change[1] * curvature[1]
