"""GPTQ with output feedback: rows make up for the errors of the rows above them, too.

A changed weight costs the model about tr(G ΔW H ΔWᵀ), for the second moments H of the inputs and G
of the output gradients. GPTQ takes G as diagonal, so that rows are independent. But outputs of a
linear act together, and where G says that two of them do, one can make up for the error of the
other, as one column does for another in GPTQ.

Measured with descent and static groups on the built-in text, KL in nats per token of 32×256
held-out tokens, for independent rows and with feedback:

    SmolLM2-135M, uniform int4 g32 asym, 32×256 calibration tokens     0.0431   0.0380
    the same, 128×256 calibration tokens                               0.0387   0.0326
    SmolLM2-135M, mixture of int4 at 118 MB, 32×256                    0.0437   0.0375
    the small trained model, sequential mixture of the demo            0.00091  0.00066

(The first row in descent blocks of 64 rows.) Believing all of G is worse than none of it:
off-diagonals whole and a damping of 0.03 gave 0.0447 in the first row. A share of 0.7 and a damping
of 0.1 were chosen on this text and not tuned further. Codes take two and a half times as long (2.06
s of CPU a block against 0.84 in the first row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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


def quantize_coupled(
    columns: Tensor,
    factor: Tensor,
    grid: ColumnGrid,
    settings: QuantizationSettings,
    importance: Tensor,
    metrics: Sequence[Tensor],
    order: Tensor | None = None,
    known: ColumnState | None = None,
) -> ColumnCodes:
    """Choose every code once, making up for the errors of the columns before and the rows above.

    Args:
        columns: W, float32 [columns, rows], groups of consecutive columns; not modified. Linears
            that share their inputs may lie side by side, as one loop serves them all.
        factor: U with UᵀU = H⁻¹, float32 [columns, columns].
        grid: Of the codes.
        settings: Clip search, rounding of scales.
        importance: H's diagonal, [columns], for a clip search.
        metrics: G of :func:`advisor.methods.outputs.output_metric` of each linear, float32 [rows of
            it, rows of it].
        order: Columns in the order of work; scales are then chosen from the weights before any
            update. None for their own order, in which a group's scale is chosen as it is reached.
        known: Scales and limits that were chosen before, with an ``order``; its steps are not read.
            Codes are then counted from its lowest step.

    Reference: GPTQ, arXiv:2210.17323, Algorithm 1; YAQA, arXiv:2505.22988, section 4 (rounding
    with feedback from both sides).
    Differs from the papers: blocks of rows, without feedback among the rows of one; G's
    off-diagonals are shrunk.
    """
    front = _Front(columns, grid, settings, importance, metrics)
    if known is not None:
        front.take(known)
    front.run(_normalised(factor), order)
    return front.codes()


def choose_coupled(
    columns: Tensor,
    factor: Tensor,
    known: ColumnState,
    settings: QuantizationSettings,
    metrics: Sequence[Tensor],
    order: Tensor,
) -> Tensor:
    """Choose steps that need not be whole numbers, for scales that stay.

    Args:
        columns: As :func:`quantize_coupled` takes them.
        factor: As well.
        known: Scales and the steps that there are; those that it has are not read.
        settings: Not used, as scales are known.
        metrics: As well.
        order: Columns in the order of work.

    Returns:
        Steps, float32 [columns, rows].
    """
    grid = ColumnGrid(8, len(columns) // len(known.scales), symmetric=False)
    front = _Front(columns, grid, settings, columns.new_ones(len(columns)), metrics)
    front.take(known)
    front.run(_normalised(factor), order)
    return front.steps()


def _normalised(factor: Tensor) -> Tensor:
    """Return a factor with every row divided by its diagonal."""
    return (factor / factor.diagonal().unsqueeze(1)).contiguous()


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


class _Front:
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
        current: [columns, blocks, rows], overwritten.
        scale: Shaped alike.
        zero: Shaped alike.
        levels: 2^bits - 1.
        factor: Of each block's columns, [blocks, columns, columns].
        values: Of the steps that there are, where they are not the whole numbers of a range.
    """
    steps, errors = torch.empty_like(current), torch.empty_like(current)
    low, high = -zero, levels - zero
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
