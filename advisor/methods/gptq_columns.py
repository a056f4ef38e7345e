"""GPTQ's column loop, run once for many grids of one weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.column_loop import INNER_BLOCK, Bundle, ColumnLoop
from advisor.numerics.affine import grid_levels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.methods.settings import QuantizationSettings


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
    loop = ColumnLoop(bundles, settings, importance)
    if order is not None:
        loop.choose_static(source, order)
        source = source[order]
    working = weight.new_empty(columns, len(grids), rows)
    working.copy_(source)  # not contiguous(), which may return the caller's own memory
    width = columns if order is not None else grids[0].width
    blocks = blocks_of(columns, width, settings.column_block)
    loop.run(working, (factor / factor.diagonal().unsqueeze(1)).contiguous(), blocks)
    back = None if order is None else torch.argsort(order)
    results: list[ColumnCodes] = []
    for bundle in bundles:
        scales, zero_points = torch.stack(bundle.scales), torch.stack(bundle.zero_points)
        for index in range(bundle.last - bundle.first):
            zero = zero_points[:, index]
            steps = working[:, bundle.first + index]
            if back is not None:  # one grid at a time: all of them are as large as memory allows
                steps = steps[back]
            codes = steps.view(-1, bundle.width, rows).add_(zero.unsqueeze(1)).to(torch.uint8)
            results.append(ColumnCodes(codes.view(columns, rows), scales[:, index], zero))
    return results


def _bundles(grids: Sequence[ColumnGrid], device: torch.device) -> list[Bundle]:
    """Gather neighbouring grids of the same width and symmetry."""
    bundles: list[Bundle] = []
    for index, grid in enumerate(grids):
        levels = grid_levels(grid.bits, device=device).view(1, 1, 1)
        last = bundles[-1] if bundles else None
        if last and (last.width, last.symmetric) == (grid.width, grid.symmetric):
            last.last = index + 1
            last.levels = torch.cat((last.levels, levels), dim=1)
        else:
            bundles.append(Bundle(grid.width, grid.symmetric, index, index + 1, levels))
    return bundles


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
        cuts = set(range(start, end, INNER_BLOCK)) | {end}
        cuts.update(range(-(-start // width) * width, end, width))
        blocks.append(sorted(cuts))
        start = end
    return blocks
