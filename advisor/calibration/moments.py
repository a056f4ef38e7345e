"""Running second moments: symmetric sums kept as panels of their lower triangle."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL_COLUMNS = 256
"""Columns of a panel. Computing only the panels on and below the diagonal takes 58% of the
operations at 1536 columns (67% at 576); measured on two AVX-512 cores it takes 63% of the time of
the whole product. Stored sums depend on it, so a change is a new version of the store."""


def panel_starts(size: int) -> range:
    """Return the first column of every panel."""
    return range(0, size, PANEL_COLUMNS)


def packed_length(size: int) -> int:
    """Return the number of values in the panels of a [size, size] moment."""
    return sum((size - start) * min(PANEL_COLUMNS, size - start) for start in panel_starts(size))


class SecondMoment:
    """Σ x xᵀ of rows added in order, in float32.

    The sum depends only on the rows and on how they were batched, so equal calls give equal bits.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        """Start at zero.

        Args:
            size: Length of a row.
            device: Where the rows will be.
        """
        self.size = size
        self._values = torch.zeros(packed_length(size), device=device)
        self._panels = split_panels(self._values, size)

    def add(self, rows: Tensor) -> None:
        """Add rows, shape [tokens, size]."""
        rows = rows.to(torch.float32)
        for start, panel in zip(panel_starts(self.size), self._panels, strict=True):
            right = rows[:, start : start + PANEL_COLUMNS]
            panel.addmm_(rows[:, start:].T, right)

    def whole(self) -> Tensor:
        """Return the sum as a matrix, shape [size, size], where the rows are."""
        return unpack_moment(self._values, self.size)

    def take(self) -> Tensor:
        """Return the packed sum, shape [packed_length], on the CPU, and start again at zero."""
        taken = self._values.to("cpu", copy=True)
        self._values.zero_()
        return taken


def split_panels(values: Tensor, size: int) -> list[Tensor]:
    """Return views of a packed moment, one [size - start, columns] panel each."""
    panels = []
    offset = 0
    for start in panel_starts(size):
        height, width = size - start, min(PANEL_COLUMNS, size - start)
        panels.append(values[offset : offset + height * width].view(height, width))
        offset += height * width
    return panels


def unpack_moment(values: Tensor, size: int) -> Tensor:
    """Return the full symmetric moment, shape [size, size], of a packed one."""
    full = torch.empty(size, size, dtype=values.dtype, device=values.device)
    for start, panel in zip(panel_starts(size), split_panels(values, size), strict=True):
        stop = start + panel.shape[1]
        full[start:, start:stop] = panel
        full[start:stop, stop:] = panel[stop - start :].T
        # Both triangles of the diagonal square were computed; keep the lower one, so that the
        # result is symmetric to the last bit.
        square = torch.tril(panel[: stop - start])
        full[start:stop, start:stop] = square + torch.tril(square, -1).T
    return full
