"""What the coordinate descent does to one group of columns: its scales first, then every code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.methods.columns_in_turn import (
    MOST_COLUMNS,
    has_kernels,
    move_in_turn,
    visit_group,
)
from advisor.numerics.nearest import ties_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from advisor.methods.column_state import ColumnState, Rounding

_BLOCK = 32
"""Columns whose residuals are updated one by one; the group's others get them as a product. As many
as a kernel takes, where there are kernels."""


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
        self.diagonal = second_moment.diagonal().unsqueeze(1).contiguous()
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


def visit(
    weight: Tensor,
    error: Tensor,
    state: ColumnState,
    couplings: Couplings,
    work: Work,
    rounding: Rounding,
    group: int,
) -> None:
    """Lower the error by what one group of columns can do, and keep account of it.

    Args:
        weight: W, float32 [columns, rows].
        error: W less what is stored; changed in the group's columns.
        state: Changed.
        couplings: Of all columns.
        work: For groups of this width.
        rounding: Of scales.
        group: Which one.
    """
    width = weight.shape[0] // len(state.scales)
    span = slice(group * width, (group + 1) * width)
    # Where the error would be least, in weights from here: what the error of all columns means for
    # these. No other group's is needed now, and one product for a group costs half of what keeping
    # all of them up to date does.
    torch.mm(couplings.shares[span], error, out=work.distance)
    done = visit_group(
        work.distance,
        (weight[span], error[span], state.steps[span], state.scales[group], state.low[group],
         state.high[group]),
        couplings.shares[span, span], couplings.diagonal[span, 0], state.values,
        rounding.round_scales,
    )  # fmt: skip
    if done:
        return
    rescale(state, work.distance, couplings, rounding, group, span)
    choose_codes(state, couplings, work, group, span)
    torch.mul(state.steps[span], state.scales[group], out=error[span])
    torch.sub(weight[span], error[span], out=error[span])


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
    ties = None if state.values is None else ties_of(state.values)
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
            if state.values is None or ties is None:
                torch.clamp(new.round_(), low, high, out=new)
            else:
                torch.index_select(state.values, 0, torch.bucketize(new, ties), out=new)
            torch.sub(old, new, out=fallen)
            rest.addcmul_(later, fallen)
        if place.stop < span.stop:
            far = slice(place.stop, span.stop)
            work.distance[block.stop :].addmm_(couplings.shares[far, place], work.fallen[block])
    state.steps[span] = work.after


def rescale(
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
