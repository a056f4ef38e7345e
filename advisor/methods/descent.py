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
from typing import TYPE_CHECKING, Protocol

import torch

from advisor.methods.columns_in_turn import MOST_COLUMNS, has_kernels, move_in_turn
from advisor.methods.gptq_columns import ColumnCodes
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from advisor.methods.settings import QuantizationSettings

_BLOCK = 32
"""Columns whose residuals are updated one by one; the group's others get them as a product. As many
as a kernel takes, where there are kernels."""


class Rounding(Protocol):
    """How scales are stored; the methods' settings are one."""

    def round_scales(self, scales: Tensor) -> Tensor:
        """Return float32 scales as they are read back; not finite where there is no other."""
        ...


@dataclass(slots=True)
class ColumnState:
    """Codes of a weight, columns (inputs) first, groups of consecutive columns.

    Attributes:
        steps: Codes minus zero points, float32 [columns, rows].
        scales: float32 [groups, rows].
        low: Smallest step, float32 [groups, rows].
        high: Largest step, float32 [groups, rows].
        values: Of the steps that there are, rising, where not all from ``low`` to ``high`` are.
    """

    steps: Tensor
    scales: Tensor
    low: Tensor
    high: Tensor
    values: Tensor | None = None

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

    def rows(self, rows: Tensor) -> ColumnState:
        """Return a copy of some rows, int64."""
        steps, scales, low, high = (
            part[:, rows] for part in (self.steps, self.scales, self.low, self.high)
        )
        return ColumnState(steps, scales, low, high, self.values)

    def put(self, rows: Tensor, state: ColumnState) -> None:
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
    couplings = Couplings(damped_moment(second_moment, settings), len(found.scales))
    descend(columns, state, couplings, settings, settings.descent)
    return state.codes()


def damped_moment(second_moment: Tensor, settings: QuantizationSettings) -> Tensor:
    """Return H with ``descent_damping`` times its mean diagonal added to the diagonal."""
    mean = float(second_moment.diagonal().double().mean())
    added = settings.descent_damping * (mean if mean > 0 else 1.0)
    return second_moment + added * torch.eye(len(second_moment), device=second_moment.device)


class Couplings:
    """H as the descent reads it: what a change of one column means for the others.

    Attributes:
        diagonal: Of H, float32 [columns, 1].
        shares: H with every row divided by its diagonal, float32 [columns, columns].
    """

    def __init__(self, second_moment: Tensor, groups: int) -> None:
        """Prepare.

        Args:
            second_moment: H, damped, float32 [columns, columns]; not modified.
            groups: Of consecutive columns.
        """
        self.diagonal = second_moment.diagonal().unsqueeze(1)
        self.shares = second_moment / self.diagonal
        size = MOST_COLUMNS if has_kernels(second_moment.device) else _BLOCK
        self.blocks = list(_blocks(len(second_moment) // groups, size))
        self._later: dict[int, list[Tensor]] = {}

    def later(self, block: slice) -> list[Tensor]:
        """Return for each of some columns what it means for those of them after it, [rest, 1]."""
        known = self._later.get(block.start)
        if known is None:
            inside = self.shares[block, block]
            known = [inside[i + 1 :, i : i + 1] for i in range(len(inside))]
            self._later[block.start] = known
        return known


def descend(
    weight: Tensor,
    state: ColumnState,
    couplings: Couplings,
    rounding: Rounding,
    passes: int,
) -> None:
    """Lower tr((W - Q) H (W - Q)ᵀ) in place, group by group.

    Of every group first the scale takes its best value for the codes as they are (rounded as it
    is stored, and kept only if that is nearer to the best), then each column in turn the code
    nearest to where the error, all other codes as they are, is least. No step raises the error.

    Args:
        weight: W, float32 [columns, rows].
        state: Changed.
        couplings: Of a damped H, for the state's groups.
        rounding: Of scales.
        passes: Times over all columns.

    Reference: CDQuant, arXiv:2406.17542, section 3 (greedy coordinate descent on codes); Frantar
    and Alistarh, OBC, arXiv:2208.11580 (the same quadratic).
    Differs from the paper: columns in turn, not the best of all; scales move too.
    """
    columns = weight.shape[0]
    width = columns // state.scales.shape[0]
    error = weight - state.weight()
    work = Work(width, weight, couplings.blocks)
    for _ in range(passes):
        for group, start in enumerate(range(0, columns, width)):
            span = slice(start, start + width)
            # Where the error would be least, in weights from here: what the error of all columns
            # means for these. No other group's is needed now, and one product for a group costs
            # half of what keeping all of them up to date does.
            torch.mm(couplings.shares[span], error, out=work.distance)
            _rescale(state, work.distance, couplings, rounding, group, span)
            choose_codes(state, couplings, work, group, span)
            torch.mul(state.steps[span], state.scales[group], out=error[span])
            torch.sub(weight[span], error[span], out=error[span])


class Work:
    """Tensors of a group, [width, rows], that all groups use in turn, with views of their rows."""

    def __init__(self, width: int, like: Tensor, blocks: list[slice]) -> None:
        """Make room for groups of a width, of as many rows as ``like`` [columns, rows] has."""
        self.distance, self.after, self.fallen = (
            like.new_empty(width, like.shape[1]) for _ in range(3)
        )
        self.rows = [
            list(
                zip(
                    self.distance[block].unbind(),
                    self.after[block].unbind(),
                    self.fallen[block].unbind(),
                    [self.distance[row + 1 : block.stop] for row in range(block.start, block.stop)],
                    strict=True,
                )
            )
            for block in blocks
        ]


def choose_codes(
    state: ColumnState, couplings: Couplings, work: Work, group: int, span: slice
) -> None:
    """Choose the codes of a group's columns in turn.

    Within a group a row has one scale, so that all is counted in its steps.

    Args:
        state: Changed.
        couplings: Of all columns.
        work: ``distance`` holds, for every weight, how far it should move.
        group: Which one.
        span: Its columns.
    """
    low, high = state.low[group], state.high[group]
    before = state.steps[span]
    work.distance.mul_(state.scales[group].reciprocal())
    for block, rows in zip(couplings.blocks, work.rows, strict=True):
        place = slice(span.start + block.start, span.start + block.stop)
        moved = move_in_turn(
            work.distance[block], before[block], (low, high), couplings.shares[place, place],
            state.values, (work.after[block], work.fallen[block]),
        )  # fmt: skip
        columns = (
            () if moved else zip(before[block].unbind(), rows, couplings.later(place), strict=True)
        )
        for old, (distance, new, fallen, rest), later in columns:
            torch.add(old, distance, out=new)
            if state.values is None:
                torch.clamp(new.round_(), low, high, out=new)
            else:
                new.copy_(state.values[nearest_values(new, state.values)])
            torch.sub(old, new, out=fallen)
            rest.addcmul_(later, fallen)
        if place.stop < span.stop:
            far = slice(place.stop, span.stop)
            work.distance[block.stop :].addmm_(couplings.shares[far, place], work.fallen[block])
    state.steps[span] = work.after


def nearest_values(wanted: Tensor, values: Tensor) -> Tensor:
    """Return the index of the nearest of some rising values, int64, shaped as ``wanted``."""
    return torch.bucketize(wanted, (values[1:] + values[:-1]) / 2)


def _rescale(
    state: ColumnState,
    distance: Tensor,
    couplings: Couplings,
    rounding: Rounding,
    group: int,
    span: slice,
) -> None:
    """Move one group's scales to where the error is least, if a stored value is nearer to it.

    Args:
        state: Changed.
        distance: The rows of ``couplings.shares`` times the error, of the group's columns, float32
            [width, rows]; kept up to date.
        couplings: Of all columns.
        rounding: Of scales.
        group: Which one.
        span: Its columns.
    """
    steps = state.steps[span]
    products = couplings.shares[span, span] @ steps
    weighted = steps * couplings.diagonal[span]
    curvature = (weighted * products).sum(0)
    slope = (weighted * distance).sum(0)
    old = state.scales[group]
    best = old + slope / curvature.clamp_min(1e-30)
    new = rounding.round_scales(best)
    better = (
        (new > 0) & new.isfinite() & (curvature > 0) & ((new - best).abs() < (old - best).abs())
    )
    change = torch.where(better, old - new, torch.zeros_like(old))
    state.scales[group] = torch.where(better, new, old)
    distance.addcmul_(products, change)


def _blocks(width: int, size: int) -> Iterator[slice]:
    """Cut a group's columns into blocks."""
    for first in range(0, width, size):
        yield slice(first, min(first + size, width))
