"""How many rows and grids go through GPTQ's column loop at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.methods.gptq_columns import ColumnCodes, ColumnGrid, blocks_of, quantize_columns

if TYPE_CHECKING:
    from advisor.methods.settings import QuantizationSettings

_WORKING_BYTES = 2**28
"""Weights updated at once; more rows than fit are done in turn, as rows are independent."""


def loop_in_parts(
    columns: Tensor,
    factor: Tensor,
    grids: list[ColumnGrid],
    settings: QuantizationSettings,
    importance: Tensor,
    order: Tensor | None,
) -> list[ColumnCodes]:
    """Run the column loop over as many rows and grids at once as memory allows.

    Rows are cut by the weight alone, so that a grid's codes do not depend on the other grids.
    """
    in_features, out_features = columns.shape
    rows = max(1, _WORKING_BYTES // (4 * in_features))
    results: list[list[ColumnCodes]] = [[] for _ in grids]
    for part in torch.split(columns, rows, dim=1):
        at_once = max(1, 4 * _WORKING_BYTES // (4 * part.numel()))
        for members in _loops(grids, in_features, settings, static=order is not None, most=at_once):
            chosen = [grids[member] for member in members]
            found = quantize_columns(part.contiguous(), factor, chosen, settings, importance, order)
            for member, codes in zip(members, found, strict=True):
                results[member].append(codes)
    if out_features <= rows:
        return [parts[0] for parts in results]
    return [
        ColumnCodes(
            torch.cat([p.codes for p in parts], 1),
            torch.cat([p.scales for p in parts], 1),
            torch.cat([p.zero_points for p in parts], 1),
        )
        for parts in results
    ]


def _loops(
    grids: list[ColumnGrid],
    in_features: int,
    settings: QuantizationSettings,
    *,
    static: bool,
    most: int,
) -> list[list[int]]:
    """Share grids out among loops: those of one loop need the same cuts of the columns."""
    by_cuts: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, grid in enumerate(grids):
        width = in_features if static else grid.width
        blocks = blocks_of(in_features, width, settings.column_block)
        by_cuts.setdefault(tuple(tuple(edges) for edges in blocks), []).append(index)
    return [
        members[first : first + most]
        for members in by_cuts.values()
        for first in range(0, len(members), most)
    ]
