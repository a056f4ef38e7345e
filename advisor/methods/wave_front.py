"""The wave front: GPTQ's loop over blocks of rows and of columns (see ``coupled``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.gptq_columns import ColumnCodes, ColumnGrid
from advisor.methods.grids import choose_grid
from advisor.methods.outputs import feedback_of, row_spans
from advisor.methods.wave_columns import round_columns
from advisor.numerics.affine import grid_levels
from advisor.numerics.nearest import Nearest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from advisor.methods.column_state import ColumnState
    from advisor.methods.settings import QuantizationSettings

ROW_BLOCK = 32
"""Rows that are quantized together, without feedback among them."""
_WIDEST_STEP = 64
"""Columns of a step, where groups do not say otherwise."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """One linear's blocks of rows.

    Attributes:
        first: Place of the first of them among all blocks.
        feedback: What the errors of the linear's rows mean for those of a block: nothing from its
            own on. float32 [blocks, rows of a block, rows].
    """

    first: int
    feedback: Tensor


@dataclass(frozen=True, slots=True)
class _Wave:
    """Who works on what in one step.

    Attributes:
        blocks: That are under way, int64.
        steps: The step of columns that each of them takes, int64.
        parts: Of each linear with blocks under way: the linear, the turns of its blocks in it
            (from, past the last), and past the last step of columns that one of them takes.
    """

    blocks: Tensor
    steps: Tensor
    parts: list[tuple[_Linear, int, int, int]]


class Front:
    """GPTQ's loop over blocks of rows and of columns.

    A block of rows works on a step of columns as soon as the rows above are done with that one; so
    blocks of rows follow each other like a wave front, and one step of Python serves all that are
    under way: it fetches what the errors so far mean for each of them. Tensors are [row blocks,
    columns, rows of a block]; a linear's last block is filled up.
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
        self._linears: list[_Linear] = []
        count = 0
        for metric in metrics:
            self._linears.append(_Linear(count, _feedback(metric)))
            count += len(self._linears[-1].feedback)
        self._weight = self._split(columns)
        self._levels = grid_levels(grid.bits, device=columns.device)
        self._steps: Tensor
        shape = (count, columns.shape[0] // grid.width, ROW_BLOCK)
        self._scales, self._zeros = columns.new_ones(shape), columns.new_zeros(shape)
        self._known: ColumnState | None = None

    def take(self, known: ColumnState) -> None:
        """Use scales and limits that were chosen before."""
        self._known = known
        self._scales, self._zeros = self._split(known.scales, 1.0), self._split(-known.low)

    def run(self, factor: Tensor, order: Tensor | None) -> None:
        """Quantize, once; ``factor`` has every row divided by its diagonal."""
        width, columns = self._grid.width, self._weight.shape[1]
        beforehand = order is not None or width == columns
        if beforehand and self._known is None:
            self._choose_all()
        values = None if self._known is None else self._known.values
        table = None if values is None else Nearest(values)
        place = torch.arange(columns, device=factor.device) if order is None else order
        size = _step(columns) if beforehand else width
        shape = (len(self._weight), columns // size, size, ROW_BLOCK)
        weight = (self._weight if order is None else self._weight[:, place]).view(shape)
        del self._weight  # what is as large as the weights is kept no longer than it is needed
        errors, taken = torch.zeros_like(weight), torch.zeros_like(weight)
        change = weight.new_zeros(shape[1], size, shape[0] * ROW_BLOCK)
        groups = (place // width).view(-1, size)
        means = factor.t().view(-1, size, columns)
        places = torch.arange(len(means), device=factor.device)
        inside = means.view(-1, size, len(means), size)[places, :, places].transpose(1, 2)
        means = means.flip(0)  # a wave's blocks take steps that fall one by one
        for wave in self._waves(len(means)):
            at = (wave.blocks, wave.steps)
            wanted = weight[at]
            current = wanted - _pull(wave, errors, means) - _shift(wave, change)
            if not beforehand:
                self._choose(current, wave)
            reached = (wave.blocks.unsqueeze(1), groups[wave.steps])
            scale, zero = self._scales[reached], self._zeros[reached]
            current, scale, zero = (
                part.transpose(0, 1).contiguous() for part in (current, scale, zero)
            )
            near = inside[wave.steps]
            steps, missed = round_columns(current, scale, zero, self._levels, near, table)
            taken[at], errors[at] = steps.transpose(0, 1), missed.transpose(0, 1)
            _keep(wave, change, (steps * scale).transpose(0, 1) - wanted)
        del weight, errors, change
        if order is None:
            self._steps = taken.flatten(1, 2)
        else:
            self._steps = torch.empty_like(taken).flatten(1, 2)
            self._steps[:, place] = taken.flatten(1, 2)

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
        """Return [columns, rows] as blocks of rows, each linear's filled up with a value.

        Rows of one block lie as far apart as can be: see :mod:`advisor.methods.outputs`.
        """
        parts = []
        for part in torch.split(columns, self._heights, dim=1):
            padded = torch.nn.functional.pad(part, (0, -part.shape[1] % ROW_BLOCK), value=fill)
            parts.append(padded.view(columns.shape[0], ROW_BLOCK, -1))
        return torch.cat(parts, 2).permute(2, 0, 1).contiguous()

    def _join(self, blocks: Tensor) -> Tensor:
        """Undo :meth:`_split`."""
        counts = [-(-height // ROW_BLOCK) for height in self._heights]
        parts = [
            part.permute(1, 2, 0).reshape(blocks.shape[1], -1)[:, :height]
            for part, height in zip(torch.split(blocks, counts), self._heights, strict=True)
        ]
        return torch.cat(parts, 1)

    def _choose(self, values: Tensor, wave: _Wave) -> None:
        """Choose the scales of the groups that are reached, from values [blocks, columns, rows]."""
        importance = self._importance.view(-1, self._grid.width)[wave.steps].t()
        scales, zeros = self._grids(values.transpose(0, 1), importance.unsqueeze(2))
        at = (wave.blocks, wave.steps)
        self._scales[at], self._zeros[at] = scales, zeros

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

    def _waves(self, steps: int) -> Iterator[_Wave]:
        """Yield who works on what; each block's columns come in that many steps."""
        device = self._levels.device
        counts = [len(linear.feedback) for linear in self._linears]
        turns = torch.cat([torch.arange(count, device=device) for count in counts])
        places = torch.arange(len(turns), device=device)
        for wave in range(max(counts) + steps - 1):
            parts = []
            for linear, count in zip(self._linears, counts, strict=True):
                first, last = max(0, wave - steps + 1), min(wave + 1, count)
                if first < last:
                    parts.append((linear, first, last, wave - first + 1))
            spans = [slice(linear.first + a, linear.first + b) for linear, a, b, _ in parts]
            blocks = torch.cat([places[span] for span in spans])
            yield _Wave(blocks, wave - torch.cat([turns[span] for span in spans]), parts)


def _pull(wave: _Wave, errors: Tensor, means: Tensor) -> Tensor:
    """Return what the errors of the columns before mean for those of a wave.

    Args:
        wave: Who works on what.
        errors: [blocks, steps, columns of a step, rows]; zeros where nothing was chosen yet.
        means: The factor transposed, last step first, [steps, columns of a step, columns].

    Returns:
        [blocks of the wave, columns of a step, rows].
    """
    found = []
    for linear, first, last, end in wave.parts:
        blocks = slice(linear.first + first, linear.first + last)
        steps = slice(len(means) - end, len(means) - end + last - first)
        before = (end - 1) * means.shape[1]
        known = errors[blocks].flatten(1, 2)[:, :before]
        found.append(torch.bmm(means[steps, :, :before], known))
    return torch.cat(found)


def _shift(wave: _Wave, change: Tensor) -> Tensor:
    """Return what the errors of the rows above mean for a wave's blocks.

    Args:
        wave: Who works on what.
        change: Quantized weights less the weights, last step first, [steps, columns of a step,
            rows of all blocks]; zeros where nothing was chosen yet.

    Returns:
        [blocks of the wave, columns of a step, rows].
    """
    found = []
    for linear, first, last, end in wave.parts:
        own = slice(linear.first * ROW_BLOCK, (linear.first + last - 1) * ROW_BLOCK)
        above = change[_steps_of(len(change), first, last, end), :, own]
        feedback = linear.feedback[first:last, :, : own.stop - own.start]
        found.append(torch.bmm(above, feedback.transpose(1, 2)))
    return torch.cat(found)


def _keep(wave: _Wave, change: Tensor, found: Tensor) -> None:
    """Take up what a wave has changed, [blocks of the wave, columns of a step, rows]."""
    parts = torch.split(found, [last - first for _, first, last, _ in wave.parts])
    for (linear, first, last, end), part in zip(wave.parts, parts, strict=True):
        rows = slice((linear.first + first) * ROW_BLOCK, (linear.first + last) * ROW_BLOCK)
        own = change[_steps_of(len(change), first, last, end), :, rows]
        blocks = own.view(*own.shape[:2], -1, ROW_BLOCK).diagonal(0, 0, 2)
        blocks.permute(2, 0, 1).copy_(part)


def _steps_of(steps: int, first: int, last: int, end: int) -> slice:
    """Return the steps that blocks are at, counted from the last one; they rise with the block."""
    return slice(steps - end, steps - end + last - first)


def _feedback(metric: Tensor) -> Tensor:
    """Return what the errors of a linear's rows mean for its blocks, as :class:`_Linear` has it."""
    missing = -len(metric) % ROW_BLOCK
    padded = torch.nn.functional.pad(metric, (0, missing) * 2)
    padded.diagonal()[len(metric) :] = 1
    order = torch.arange(len(padded), device=metric.device).view(ROW_BLOCK, -1).t().flatten()
    padded = padded[order][:, order]
    found = metric.new_zeros(len(padded) // ROW_BLOCK, ROW_BLOCK, len(padded))
    for own, rows in zip(found, row_spans(len(padded), ROW_BLOCK), strict=True):
        own[:, : rows.start] = feedback_of(padded, rows)[:, : rows.start]
    return found


def _step(columns: int) -> int:
    """Return the largest divisor of a number of columns that is no wider than a step."""
    return max(size for size in range(1, _WIDEST_STEP + 1) if columns % size == 0)
