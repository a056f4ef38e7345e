"""Running second moments: symmetric sums kept as panels of their lower triangle."""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

PANEL_COLUMNS = 256
"""Columns of a panel. Computing only the panels on and below the diagonal takes 58% of the
operations at 1536 columns (67% at 576); measured on two AVX-512 cores it takes 63% of the time of
the whole product. Stored sums depend on it, so a change is a new version of the store."""


_STEPS = 2.0**15 - 1.0
"""Of a correlation of 1, in a compact moment."""


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


def compacted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return a packed moment in half of the bytes: its correlations in steps of 2^-15.

    No entry is off by more than 2^-16 √(Hᵢᵢ Hⱼⱼ), and the diagonal by none of that: at 14336 inputs
    the error's largest eigenvalue is about 0.2% of the diagonal, where damping adds 1% or more.
    Codes that GPTQ fits to compact moments have 0.999 to 1.001 of the error of those fitted to
    whole ones (SmolLM2, 35 modules, int4 in groups of 32).

    Args:
        values: float32 [packed_length]; not modified.

    Returns:
        Correlations, int16 [packed_length], and the roots of the diagonal, float32 [size].
    """
    size = _size_of(len(values))
    panels = split_panels(values, size)
    roots = torch.cat([panel.diagonal() for panel in panels]).clamp_min(0.0).sqrt()
    steps = torch.empty(values.shape, dtype=torch.int16, device=values.device)
    inverse = torch.where(roots > 0, _STEPS / roots, torch.zeros_like(roots))
    starts = panel_starts(size)
    for start, panel, target in zip(starts, panels, split_panels(steps, size), strict=True):
        own = panel * inverse[start:, None]
        own.mul_((inverse / _STEPS)[start : start + panel.shape[1]])
        target.copy_(own.round_().clamp_(-_STEPS, _STEPS))
    return steps, roots


def expanded(steps: Tensor, roots: Tensor) -> Tensor:
    """Return the packed moment, float32, that :func:`compacted` made smaller."""
    size = len(roots)
    values = steps.float()
    for start, panel in zip(panel_starts(size), split_panels(values, size), strict=True):
        panel.mul_(roots[start:, None]).mul_(roots[start : start + panel.shape[1]] / _STEPS)
    return values


def _size_of(length: int) -> int:
    """Return the size of the moment whose panels have so many values: at least half its square."""
    return bisect.bisect_left(range(math.isqrt(2 * length) + 1), length, key=packed_length)


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
