"""The state of GPTQ's column loop: many grids side by side, the scales of each column's group."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.columns_in_turn import has_kernels, round_in_turn
from advisor.methods.grids import choose_grid

if TYPE_CHECKING:
    from advisor.methods.settings import QuantizationSettings

INNER_BLOCK = 16
"""Columns whose updates go one by one; later columns get them as matrix products."""


@dataclass(slots=True)
class Bundle:
    """Neighbouring grids that differ in bits only, so that their scales are chosen together."""

    width: int
    symmetric: bool
    first: int
    last: int
    levels: Tensor  # [1, last - first, 1]
    scales: list[Tensor] = field(default_factory=list)  # one [last - first, rows] a group
    zero_points: list[Tensor] = field(default_factory=list)
    current: int = -1  # the group whose scales the loop uses now


class ColumnLoop:
    """The column loop's state: the scale and the limits of the current column in every grid."""

    def __init__(
        self, bundles: list[Bundle], settings: QuantizationSettings, importance: Tensor
    ) -> None:
        """Prepare.

        Args:
            bundles: Neighbouring grids.
            settings: Clip search and rounding of scales.
            importance: Weight of each column in the clip search, [columns], in the model's order.
        """
        self.bundles = bundles
        self.settings = settings
        self.importance = importance
        self.order: list[int] | None = None

    def run(self, working: Tensor, factor: Tensor, blocks: list[list[int]]) -> None:
        """Quantize all columns in place.

        Args:
            working: Weights [columns, grids, rows]; becomes codes minus zero points.
            factor: Inverse Cholesky factor with every row divided by its diagonal.
            blocks: From :func:`blocks_of`.
        """
        columns, count, rows = working.shape
        flat = working.view(columns, count * rows)
        self.scale, self.low, self.high = (working.new_empty(count, rows) for _ in range(3))
        self.change = working.new_empty(INNER_BLOCK, count * rows)
        size = max(edges[-1] - edges[0] for edges in blocks)
        errors = working.new_empty(size, count, rows)
        rounded = working.new_empty(INNER_BLOCK, count, rows)
        for edges in blocks:
            start, end = edges[0], edges[-1]
            for first, last in itertools.pairwise(edges):
                self._start_groups(working, first)
                self._columns(flat, factor, errors, rounded, (start, first, last))
                _propagate(working, factor, errors[first - start :], (first, last), end)
                working[first:last] = rounded[: last - first]
            _propagate(working, factor, errors, (start, end), columns)

    def _columns(
        self,
        flat: Tensor,
        factor: Tensor,
        errors: Tensor,
        rounded: Tensor,
        span: tuple[int, int, int],
    ) -> None:
        """Quantize the columns of one inner block, updating only those."""
        start, first, last = span
        places = (rounded[: last - first], errors[first - start : last - start])
        out = tuple(part.view(last - first, 1, -1) for part in places)
        if has_kernels(flat.device) and round_in_turn(
            flat[first:last, None], self._limits(first, last), factor[None, first:last, first:last],
            None, (out[0], out[1]),
        ):  # fmt: skip
            return
        scale, low, high = self.scale.view(-1), self.low.view(-1), self.high.view(-1)
        for column in range(first, last):
            if self.order is not None:
                self._enter_groups_of(self.order[column])
            values = flat[column]
            nearest = rounded[column - first].view(-1)
            error = errors[column - start].view(-1)
            torch.div(values, scale, out=nearest)
            nearest.round_()
            torch.clamp(nearest, low, high, out=nearest)
            # Products are rounded before they are subtracted: a fused kernel may do so or not,
            # depending on where in a vector an element lies, and so on the neighbouring grids.
            torch.mul(nearest, scale, out=error)
            torch.sub(values, error, out=error)
            if column + 1 < last:
                following = slice(column + 1, last)
                change = self.change[: last - column - 1]
                torch.mul(factor[column, following].unsqueeze(1), error, out=change)
                flat[following].sub_(change)

    def _limits(self, first: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return scales, smallest and largest steps, [columns or 1, 1, grids x rows]."""
        if self.order is None:
            own = (self.scale, self.low, self.high)
            return own[0].view(1, 1, -1), own[1].view(1, 1, -1), own[2].view(1, 1, -1)
        found: list[list[Tensor]] = [[], [], []]
        for bundle in self.bundles:
            groups = [column // bundle.width for column in self.order[first:last]]
            zero = torch.stack([bundle.zero_points[group] for group in groups])
            found[0].append(torch.stack([bundle.scales[group] for group in groups]))
            found[1].append(-zero)
            found[2].append(bundle.levels - zero)
        scale, low, high = (torch.cat(part, 1).view(last - first, 1, -1) for part in found)
        return scale, low, high

    def _start_groups(self, working: Tensor, column: int) -> None:
        """Choose the scales of the groups that start at a column."""
        if self.order is not None:
            return
        for bundle in self.bundles:
            if column % bundle.width:
                continue
            options = slice(bundle.first, bundle.last)
            scale, zero_point = self._choose(
                bundle, working[column : column + bundle.width, options], column
            )
            bundle.scales.append(scale)
            bundle.zero_points.append(zero_point)
            self._use(bundle, len(bundle.scales) - 1)

    def _enter_groups_of(self, column: int) -> None:
        """Use the scales, chosen beforehand, of the groups that a column of the model is in."""
        for bundle in self.bundles:
            group = column // bundle.width
            if group != bundle.current:
                self._use(bundle, group)

    def _use(self, bundle: Bundle, group: int) -> None:
        """Make a group's scale and limits those of the current column."""
        options = slice(bundle.first, bundle.last)
        self.scale[options] = bundle.scales[group]
        if bundle.current < 0 or not bundle.symmetric:
            zero_point = bundle.zero_points[group]
            torch.neg(zero_point, out=self.low[options])
            torch.sub(bundle.levels[0], zero_point, out=self.high[options])
        bundle.current = group

    def _choose(self, bundle: Bundle, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Return scale and zero point, [grids of the bundle, rows], of one group."""
        scale, zero_point = choose_grid(
            values,
            bundle.levels,
            dim=0,
            symmetric=bundle.symmetric,
            settings=self.settings,
            importance=self.importance[column : column + bundle.width].view(-1, 1, 1),
        )
        return scale[0], zero_point[0]

    def choose_static(self, source: Tensor, order: Tensor) -> None:
        """Choose all scales from the unquantized weight.

        Args:
            source: [columns, 1, rows], in the model's order.
            order: Columns in the order of work.
        """
        for bundle in self.bundles:
            values = source.expand(-1, bundle.last - bundle.first, -1)
            for column in range(0, len(source), bundle.width):
                chosen = self._choose(bundle, values[column : column + bundle.width], column)
                bundle.scales.append(chosen[0])
                bundle.zero_points.append(chosen[1])
        self.order = order.tolist()


def _propagate(
    working: Tensor, factor: Tensor, errors: Tensor, span: tuple[int, int], end: int
) -> None:
    """Subtract what the errors of the columns ``span`` mean for the columns up to ``end``."""
    first, last = span
    if last >= end:
        return
    weights = factor[first:last, last:end].t()
    for grid in range(working.shape[1]):
        part = working[last:end, grid]
        torch.addmm(part, weights, errors[: last - first, grid], alpha=-1, out=part)
