"""Codes and scales of a weight while they are chosen, inputs first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from advisor.methods.gptq_columns import ColumnCodes
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from torch import Tensor


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
