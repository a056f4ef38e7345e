"""The wave front: GPTQ's loop over blocks of rows and of columns (see ``coupled``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.columns_in_turn import round_in_turn
from advisor.methods.descent import ColumnState, nearest_values
from advisor.methods.gptq_columns import ColumnCodes, ColumnGrid
from advisor.methods.grids import choose_grid
from advisor.methods.outputs import feedback_of, row_spans
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from advisor.methods.settings import QuantizationSettings

ROW_BLOCK = 32
"""Rows that are quantized together, without feedback among them."""
_WIDEST_STEP = 64
"""Columns of a step, where groups do not say otherwise."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows that are quantized together.

    Attributes:
        first: Place of the first block of the same linear.
        turn: Blocks of that linear before this one.
        feedback: What the errors of the rows above mean for these, float32 [rows, rows above].
    """

    first: int
    turn: int
    feedback: Tensor


class Front:
    """GPTQ's loop over blocks of rows and of columns.

    A block of rows works on a block of columns as soon as the rows above are done with that one;
    so blocks of rows follow each other like a wave front, and one step of Python serves all that
    are under way. Tensors are [row blocks, columns, rows of a block]; a linear's last block is
    filled up.
    """

    def __init__(
        self,
        columns: Tensor,
        grid: ColumnGrid,
        settings: QuantizationSettings,
        importance: Tensor,
        metrics: Sequence[Tensor],
    ) -> None:
        """Prepare; the arguments are those of :func:`advisor.methods.coupled.quantize_coupled`."""
        self._grid = grid
        self._settings = settings
        self._importance = importance
        self._heights = [len(metric) for metric in metrics]
        self._blocks: list[_Block] = []
        for metric in metrics:
            self._blocks += _row_blocks(metric, first=len(self._blocks))
        self._weight = self._split(columns)
        self._levels = grid_levels(grid.bits, device=columns.device)
        self._steps = torch.zeros_like(self._weight)
        shape = (len(self._blocks), columns.shape[0] // grid.width, ROW_BLOCK)
        self._scales, self._zeros = columns.new_ones(shape), columns.new_zeros(shape)
        self._known: ColumnState | None = None

    def take(self, known: ColumnState) -> None:
        """Use scales and limits that were chosen before."""
        self._known = known
        self._scales, self._zeros = self._split(known.scales, 1.0), self._split(-known.low)

    def run(self, factor: Tensor, order: Tensor | None) -> None:
        """Quantize; ``factor`` has every row divided by its diagonal."""
        width, columns = self._grid.width, self._weight.shape[1]
        beforehand = order is not None or width == columns
        if beforehand and self._known is None:
            self._choose_all()
        values_of_steps = None if self._known is None else self._known.values
        place = torch.arange(columns, device=factor.device) if order is None else order
        working = self._weight[:, place]
        change = torch.zeros_like(working)
        for active, spans in self._waves(columns, _step(columns) if beforehand else width):
            current = torch.stack(
                [
                    working[block, span] - self._shift(change, block, span)
                    for block, span in zip(active, spans, strict=True)
                ],
                dim=1,
            )
            if not beforehand:
                self._choose(current, active, spans)
            groups = [place[span] // width for span in spans]
            scale, zero = (
                torch.stack([part[b, g] for b, g in zip(active, groups, strict=True)], dim=1)
                for part in (self._scales, self._zeros)
            )
            near = torch.stack([factor[span, span] for span in spans])
            steps, errors = _columns(current, scale, zero, self._levels, near, values_of_steps)
            values = steps * scale
            for index, (block, span) in enumerate(zip(active, spans, strict=True)):
                self._steps[block, place[span]] = steps[:, index]
                change[block, span] = values[:, index] - self._weight[block, place[span]]
                later = working[block, span.stop :]
                later.addmm_(factor[span, span.stop :].t(), errors[:, index], alpha=-1)

    def codes(self) -> ColumnCodes:
        """Return what was chosen."""
        codes = self._steps + self._zeros.repeat_interleave(self._grid.width, 1)
        return ColumnCodes(
            self._join(codes).to(torch.uint8), self._join(self._scales), self._join(self._zeros)
        )

    def steps(self) -> Tensor:
        """Return the steps that were chosen, float32 [columns, rows]."""
        return self._join(self._steps)

    def _split(self, columns: Tensor, fill: float = 0.0) -> Tensor:
        """Return [columns, rows] as blocks of rows, each linear's filled up with a value."""
        parts = []
        for part in torch.split(columns, self._heights, dim=1):
            padded = torch.nn.functional.pad(part, (0, -part.shape[1] % ROW_BLOCK), value=fill)
            parts.append(padded.view(columns.shape[0], -1, ROW_BLOCK))
        return torch.cat(parts, 1).transpose(0, 1).contiguous()

    def _join(self, blocks: Tensor) -> Tensor:
        """Undo :meth:`_split`."""
        counts = [-(-height // ROW_BLOCK) for height in self._heights]
        parts = [
            part.transpose(0, 1).reshape(blocks.shape[1], -1)[:, :height]
            for part, height in zip(torch.split(blocks, counts), self._heights, strict=True)
        ]
        return torch.cat(parts, 1)

    def _shift(self, change: Tensor, place: int, span: slice) -> Tensor:
        """Return what the errors of the rows above mean for a block, [columns, rows]."""
        block = self._blocks[place]
        above = change[block.first : place, span].transpose(0, 1)
        return above.reshape(span.stop - span.start, -1) @ block.feedback.t()

    def _choose(self, values: Tensor, active: Sequence[int], spans: Sequence[slice]) -> None:
        """Choose the scales of the groups that are reached, from values [columns, blocks, rows]."""
        importance = torch.stack([self._importance[span] for span in spans], dim=1)
        scales, zeros = self._grids(values, importance.unsqueeze(2))
        for index, (block, span) in enumerate(zip(active, spans, strict=True)):
            group = span.start // self._grid.width
            self._scales[block, group], self._zeros[block, group] = scales[index], zeros[index]

    def _choose_all(self) -> None:
        """Choose all scales from the weights before any change."""
        width = self._grid.width
        for group in range(self._scales.shape[1]):
            span = slice(group * width, (group + 1) * width)
            values = self._weight[:, span].transpose(0, 1)
            chosen = self._grids(values, self._importance[span].view(-1, 1, 1))
            self._scales[:, group], self._zeros[:, group] = chosen

    def _grids(self, values: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        scales, zeros = choose_grid(
            values,
            self._levels.view(1, 1, 1),
            dim=0,
            symmetric=self._grid.symmetric,
            settings=self._settings,
            importance=importance,
        )
        return scales[0], zeros[0]

    def _waves(self, columns: int, size: int) -> Iterator[tuple[list[int], list[slice]]]:
        """Yield the blocks of rows that are under way, and the columns that each is to take."""
        steps = columns // size
        for wave in range(max(block.turn for block in self._blocks) + steps):
            active = {
                place: (wave - block.turn) * size
                for place, block in enumerate(self._blocks)
                if 0 <= wave - block.turn < steps
            }
            yield list(active), [slice(start, start + size) for start in active.values()]


def _columns(
    current: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor,
    factor: Tensor,
    values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Quantize columns in turn, updating those to come; return codes minus zeros, and errors.

    Args:
        current: [columns, blocks, rows], may be overwritten.
        scale: Shaped alike.
        zero: Shaped alike.
        levels: 2^bits - 1.
        factor: Of each block's columns, [blocks, columns, columns].
        values: Of the steps that there are, where they are not the whole numbers of a range.
    """
    steps, errors = torch.empty_like(current), torch.empty_like(current)
    low, high = -zero, levels - zero
    if round_in_turn(current, (scale, low, high), factor, values, (steps, errors)):
        return steps, errors
    later = factor.permute(1, 2, 0).unsqueeze(3).contiguous()
    tensors = (current, scale, low, high, steps, errors)
    for column, rows in enumerate(zip(*(tensor.unbind() for tensor in tensors), strict=True)):
        value, unit, least, most, step, error = rows
        torch.div(value, unit, out=step)
        if values is None:
            torch.clamp(step.round_(), least, most, out=step)
        else:
            step.copy_(values[nearest_values(step, values)])
        torch.addcmul(value, step, unit, value=-1, out=error)
        current[column + 1 :].addcmul_(later[column, column + 1 :], error, value=-1)
    return steps, errors


def _row_blocks(metric: Tensor, first: int) -> list[_Block]:
    """Return a linear's blocks of rows, the first of which has that place."""
    missing = -len(metric) % ROW_BLOCK
    padded = torch.nn.functional.pad(metric, (0, missing) * 2)
    padded.diagonal()[len(metric) :] = 1
    return [
        _Block(first, turn, feedback_of(padded, rows)[:, : rows.start])
        for turn, rows in enumerate(row_spans(len(padded), ROW_BLOCK))
    ]


def _step(columns: int) -> int:
    """Return the largest divisor of a number of columns that is no wider than a step."""
    return max(size for size in range(1, _WIDEST_STEP + 1) if columns % size == 0)
