"""Coordinate descent on codes and scales: what GPTQ chose, improved one value at a time.

GPTQ decides on every column once, and on scales before any code of the group. Going over all of
them again, each the best for what the others are, lowers the layer's error on inputs that no code
was fitted to (SmolLM2-135M, 12 linears of three blocks, 4096 calibration tokens, judged on 4096
others; geometric mean of the error against GPTQ alone, three passes, damping 0.05): 0.91 for int4
g32 asym, 0.93 for int4 g64 sym, 0.97 for int8 per channel; after a clip search 0.88, 0.89, 0.95. A
damping of 0.01 gains less (0.94, 0.96, 0.99), as more of the gain is on the calibration alone.
Three passes take about as long as GPTQ itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from advisor.methods.gptq_columns import ColumnCodes
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.methods.settings import QuantizationSettings

_BLOCK = 32
"""Columns whose residuals are updated one by one; the group's others get them as a product."""


@dataclass(slots=True)
class ColumnState:
    """Codes of a weight, columns (inputs) first, groups of consecutive columns.

    Attributes:
        steps: Codes minus zero points, float32 [columns, rows].
        scales: float32 [groups, rows].
        low: Smallest step, float32 [groups, rows].
        high: Largest step, float32 [groups, rows].
    """

    steps: Tensor
    scales: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, found: ColumnCodes, bits: int) -> ColumnState:
        """Return the state of codes of that many bits; they are not modified."""
        width = found.codes.shape[0] // found.scales.shape[0]
        zeros = found.zero_points.float()
        steps = found.codes.float() - zeros.repeat_interleave(width, 0)
        levels = float(grid_levels(bits, device=found.codes.device))
        return cls(steps, found.scales.clone(), -zeros, levels - zeros)

    def weight(self) -> Tensor:
        """Return the quantized weight, float32 [columns, rows]."""
        return self.steps * self._spread(self.scales)

    def codes(self) -> ColumnCodes:
        """Return the codes that the state stands for."""
        codes = (self.steps - self._spread(self.low)).to(torch.uint8)
        return ColumnCodes(codes, self.scales, -self.low)

    def rows(self, rows: slice) -> ColumnState:
        """Return a copy of some rows."""
        parts = (self.steps, self.scales, self.low, self.high)
        return ColumnState(*(part[:, rows].contiguous() for part in parts))

    def put(self, rows: slice, state: ColumnState) -> None:
        """Take up the steps and scales of some rows."""
        self.steps[:, rows], self.scales[:, rows] = state.steps, state.scales

    def _spread(self, values: Tensor) -> Tensor:
        """Return a value of each group for every column."""
        return values.repeat_interleave(self.steps.shape[0] // len(values), 0)


def improve(
    columns: Tensor,
    found: ColumnCodes,
    bits: int,
    second_moment: Tensor,
    settings: QuantizationSettings,
) -> ColumnCodes:
    """Return better codes and scales for a weight; zero points stay.

    Args:
        columns: W, float32 [columns, rows], groups of consecutive columns; not modified.
        found: Codes to start from, in the same order of columns; not modified.
        bits: Width of a code.
        second_moment: H in that order, float32 [columns, columns], not damped.
        settings: ``descent`` passes, ``descent_damping``, rounding of scales.
    """
    state = ColumnState.of(found, bits)
    descend(columns, state, damped_moment(second_moment, settings), settings, settings.descent)
    return state.codes()


def damped_moment(second_moment: Tensor, settings: QuantizationSettings) -> Tensor:
    """Return H with ``descent_damping`` times its mean diagonal added to the diagonal."""
    mean = float(second_moment.diagonal().double().mean())
    added = settings.descent_damping * (mean if mean > 0 else 1.0)
    return second_moment + added * torch.eye(len(second_moment), device=second_moment.device)


def descend(
    weight: Tensor,
    state: ColumnState,
    second_moment: Tensor,
    settings: QuantizationSettings,
    passes: int,
) -> None:
    """Lower tr((W - Q) H (W - Q)ᵀ) in place, group by group.

    Of every group first the scale takes its best value for the codes as they are (rounded as it
    is stored, and kept only if that is nearer to the best), then each column in turn the code
    nearest to where the error, all other codes as they are, is least. No step raises the error.

    Args:
        weight: W, float32 [columns, rows].
        state: Changed.
        second_moment: H, damped, float32 [columns, columns].
        settings: Rounding of scales.
        passes: Times over all columns.

    Reference: CDQuant, arXiv:2406.17542, section 3 (greedy coordinate descent on codes); Frantar
    and Alistarh, OBC, arXiv:2208.11580 (the same quadratic).
    Differs from the paper: columns in turn, not the best of all; scales move too.
    """
    columns = weight.shape[0]
    width = columns // state.scales.shape[0]
    error = weight - state.weight()
    inverse_diagonal = second_moment.diagonal().reciprocal().tolist()
    for _ in range(passes):
        for group, start in enumerate(range(0, columns, width)):
            span = slice(start, start + width)
            # What the error of all columns means for these: no other group's is needed now, and
            # one product for a group costs half of what keeping all of them up to date does.
            residual = second_moment[span] @ error
            moment = second_moment[span, span]
            _rescale(state, residual, moment, settings, group, span)
            scale = state.scales[group]
            for first in range(0, width, _BLOCK):
                last = min(first + _BLOCK, width)
                block = slice(start + first, start + last)
                change = _choose_codes(
                    state,
                    group,
                    block,
                    residual[first:last],
                    moment[first:last, first:last],
                    inverse_diagonal[block],
                )
                if last < width:
                    residual[last:].addmm_(moment[last:, first:last], change)
            torch.sub(weight[span], state.steps[span] * scale, out=error[span])


def _choose_codes(
    state: ColumnState,
    group: int,
    block: slice,
    residual: Tensor,
    moment: Tensor,
    inverse_diagonal: list[float],
) -> Tensor:
    """Choose the codes of some columns of a group in turn; return how much each weight fell.

    Args:
        state: Changed.
        group: Whose scale and limits they have.
        block: The columns.
        residual: H times the error, of these columns, float32 [block, rows]; overwritten.
        moment: H within the block.
        inverse_diagonal: Of H, of these columns.
    """
    scale, low, high = state.scales[group], state.low[group], state.high[group]
    per_step = scale.reciprocal()
    before = state.steps[block]
    after = torch.empty_like(before)
    change = torch.empty_like(before)
    for index, inverse in enumerate(inverse_diagonal):
        best, fallen = after[index], change[index]
        torch.addcmul(before[index], residual[index], per_step, value=inverse, out=best)
        best.round_()
        torch.clamp(best, low, high, out=best)
        torch.sub(before[index], best, out=fallen)
        fallen.mul_(scale)
        residual[index + 1 :].addcmul_(moment[index + 1 :, index : index + 1], fallen)
    state.steps[block] = after
    return change


def _rescale(
    state: ColumnState,
    residual: Tensor,
    moment: Tensor,
    settings: QuantizationSettings,
    group: int,
    span: slice,
) -> None:
    """Move one group's scales to where the error is least, if a stored value is nearer to it.

    Args:
        state: Changed.
        residual: H times the error, of the group's columns, float32 [width, rows]; kept up to date.
        moment: H within the group.
        settings: Rounding of scales.
        group: Which one.
        span: Its columns.
    """
    steps = state.steps[span]
    products = moment @ steps
    curvature = (steps * products).sum(0)
    slope = (steps * residual).sum(0)
    old = state.scales[group]
    best = old + slope / curvature.clamp_min(1e-30)
    new = settings.round_scales(best)
    better = (
        (new > 0) & new.isfinite() & (curvature > 0) & ((new - best).abs() < (old - best).abs())
    )
    change = torch.where(better, old - new, torch.zeros_like(old))
    state.scales[group] = old - change
    residual.addcmul_(products, change)
