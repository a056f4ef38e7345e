"""GPTQ's column loop, run once for many grids of one weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.columns_in_turn import has_kernels, round_in_turn
from advisor.methods.grids import choose_grid
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.methods.settings import QuantizationSettings

_INNER_BLOCK = 16
"""Columns whose updates go one by one; later columns get them as matrix products."""


@dataclass(frozen=True, slots=True)
class ColumnGrid:
    """One integer grid that a weight is quantized to.

    Attributes:
        bits: Width of a code.
        width: Consecutive columns that share a scale.
        symmetric: Whether the zero point is fixed.
    """

    bits: int
    width: int
    symmetric: bool


@dataclass(frozen=True, slots=True)
class ColumnCodes:
    """What the loop found for one grid.

    Attributes:
        codes: uint8, shape [columns, rows].
        scales: float32, shape [groups, rows].
        zero_points: float32, shape [groups, rows].
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor


@dataclass(slots=True)
class _Bundle:
    """Neighbouring grids that differ in bits only, so that their scales are chosen together."""

    width: int
    symmetric: bool
    first: int
    last: int
    levels: Tensor  # [1, last - first, 1]
    scales: list[Tensor] = field(default_factory=list)  # one [last - first, rows] a group
    zero_points: list[Tensor] = field(default_factory=list)
    current: int = -1  # the group whose scales the loop uses now


def quantize_columns(
    weight: Tensor,
    factor: Tensor,
    grids: Sequence[ColumnGrid],
    settings: QuantizationSettings,
    importance: Tensor,
    order: Tensor | None = None,
) -> list[ColumnCodes]:
    """Quantize columns in turn, each time making up for the error in the columns to come.

    Grids lie side by side as further rows, so that one Python step serves all of them; matrix
    products go grid by grid, so that a grid's codes do not depend on its neighbours.

    Scales come from the weights as updated when their group is reached. With ``order`` they come
    from the weights before any update, since the columns of a group are then far apart.

    Args:
        weight: float32 [columns, rows] (inputs first), in the model's order; not modified.
        factor: Upper triangular inverse Cholesky factor [columns, columns], in the order of work.
        grids: All of the same :func:`blocks_of` unless there is an ``order``; those with the same
            width and symmetry should be neighbours.
        settings: ``column_block``, clip search and rounding of scales.
        importance: Weight of each column in the clip search, [columns], in the model's order.
        order: int64 [columns], the order of work over static groups; None for the model's.

    Returns:
        One result per grid; codes in the model's order.
    """
    columns, rows = weight.shape
    bundles = _bundles(grids, weight.device)
    source = weight.unsqueeze(1)
    loop = _Loop(bundles, settings, importance)
    if order is not None:
        loop.choose_static(source, order)
        source = source[order]
    working = weight.new_empty(columns, len(grids), rows)
    working.copy_(source)  # not contiguous(), which may return the caller's own memory
    steps = torch.empty_like(working, dtype=torch.int16)
    width = columns if order is not None else grids[0].width
    blocks = blocks_of(columns, width, settings.column_block)
    loop.run(working, (factor / factor.diagonal().unsqueeze(1)).contiguous(), steps, blocks)
    if order is not None:
        steps = steps[torch.argsort(order)]
    results: list[ColumnCodes] = []
    for bundle in bundles:
        scales, zero_points = torch.stack(bundle.scales), torch.stack(bundle.zero_points)
        for index in range(bundle.last - bundle.first):
            zero = zero_points[:, index]
            signed = steps[:, bundle.first + index].reshape(-1, bundle.width, rows)
            codes = signed.add_(zero.to(torch.int16).unsqueeze(1)).to(torch.uint8)
            results.append(ColumnCodes(codes.view(columns, rows), scales[:, index], zero))
    return results


def _bundles(grids: Sequence[ColumnGrid], device: torch.device) -> list[_Bundle]:
    """Gather neighbouring grids of the same width and symmetry."""
    bundles: list[_Bundle] = []
    for index, grid in enumerate(grids):
        levels = grid_levels(grid.bits, device=device).view(1, 1, 1)
        last = bundles[-1] if bundles else None
        if last and (last.width, last.symmetric) == (grid.width, grid.symmetric):
            last.last = index + 1
            last.levels = torch.cat((last.levels, levels), dim=1)
        else:
            bundles.append(_Bundle(grid.width, grid.symmetric, index, index + 1, levels))
    return bundles


class _Loop:
    """The column loop's state: the scale and the limits of the current column in every grid."""

    def __init__(
        self, bundles: list[_Bundle], settings: QuantizationSettings, importance: Tensor
    ) -> None:
        self.bundles = bundles
        self.settings = settings
        self.importance = importance
        self.order: list[int] | None = None

    def run(self, working: Tensor, factor: Tensor, steps: Tensor, blocks: list[list[int]]) -> None:
        """Quantize all columns in place.

        Args:
            working: [columns, grids, rows], overwritten.
            factor: Inverse Cholesky factor with every row divided by its diagonal.
            steps: int16, shaped as ``working``: receives codes minus zero points.
            blocks: From :func:`blocks_of`.
        """
        columns, count, rows = working.shape
        flat = working.view(columns, count * rows)
        self.scale, self.low, self.high = (working.new_empty(count, rows) for _ in range(3))
        self.change = working.new_empty(_INNER_BLOCK, count * rows)
        size = max(edges[-1] - edges[0] for edges in blocks)
        errors, rounded = (working.new_empty(size, count, rows) for _ in range(2))
        for edges in blocks:
            start, end = edges[0], edges[-1]
            for first, last in itertools.pairwise(edges):
                self._start_groups(working, first)
                self._columns(flat, factor, errors, rounded, (start, first, last))
                _propagate(working, factor, errors[first - start :], (first, last), end)
            _propagate(working, factor, errors, (start, end), columns)
            steps[start:end] = rounded[: end - start]

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
        place = slice(first - start, last - start)
        out = tuple(part[place].view(last - first, 1, -1) for part in (rounded, errors))
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
            nearest = rounded[column - start].view(-1)
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

    def _use(self, bundle: _Bundle, group: int) -> None:
        """Make a group's scale and limits those of the current column."""
        options = slice(bundle.first, bundle.last)
        self.scale[options] = bundle.scales[group]
        if bundle.current < 0 or not bundle.symmetric:
            zero_point = bundle.zero_points[group]
            torch.neg(zero_point, out=self.low[options])
            torch.sub(bundle.levels[0], zero_point, out=self.high[options])
        bundle.current = group

    def _choose(self, bundle: _Bundle, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
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


def blocks_of(columns: int, width: int, column_block: int) -> list[list[int]]:
    """Cut columns into blocks, and blocks into inner blocks, for groups of a width.

    A group lies in one block or starts where one starts, and starts where an inner block starts;
    so its columns are up to date when its scale is chosen. Grids whose cuts are equal can run in
    one loop with the very same result as alone: usual group sizes (powers of two from 16) and
    whole channels all can.

    Returns:
        Per block, the edges of its inner blocks, both ends included.
    """
    blocks: list[list[int]] = []
    start = 0
    while start < columns:
        end = min(start + column_block, columns)
        last_start = (end - 1) // width * width
        if start < last_start and last_start + width > end:
            end = last_start
        cuts = set(range(start, end, _INNER_BLOCK)) | {end}
        cuts.update(range(-(-start // width) * width, end, width))
        blocks.append(sorted(cuts))
        start = end
    return blocks


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
