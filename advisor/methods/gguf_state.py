"""A weight in GGUF blocks, inputs first: codes and fields, and the column loop over them.

Fields stay as they are in the loop, so that a weight plus its groups' minimums is one in codes
times scales, which the loops of GPTQ take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from advisor.methods.column_state import ColumnState
from advisor.methods.gptq_float import quantize_in_turn
from advisor.numerics.gguf_blocks import BlockType, code_values, get_block_type
from advisor.numerics.nearest import Nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_BLOCK = 32
"""Columns of the loop whose updates go one by one."""
SMALLEST_FACTOR = 2.0**-24
"""The smallest float16 above zero."""


@dataclass(slots=True)
class BlockState:
    """Codes and fields of a weight, columns (inputs) first.

    A value is ``d · s · step - dmin · m``. Types whose groups have no fields of their own have
    ``s`` of 1 and ``m`` of -1 throughout.

    Attributes:
        kind: Block type.
        codes: Steps (what a code stands for before scale and minimum), and the scales ``d · s``.
        d: Factor of the scales, exact in float16, [blocks, rows].
        s: Scale of each group, whole numbers, [groups, rows].
        dmin: Factor of the minimums, as ``d``; None where the type has none.
        m: Minimum of each group, as ``s``.
    """

    kind: BlockType
    codes: ColumnState
    d: Tensor
    s: Tensor
    dmin: Tensor | None
    m: Tensor

    @classmethod
    def of(cls, name: str, codes: Tensor, fields: dict[str, Tensor]) -> BlockState:
        """Return the state of codes uint8 [out, in] and a block's fields.

        Where a scale is zero, the smallest there is takes its place, as it can be used for more.
        """
        kind = get_block_type(name)
        values = code_values(name).to(codes.device)
        d = fields["d"].t().contiguous()
        d = torch.where(d == 0, torch.full_like(d, SMALLEST_FACTOR), d)
        groups = kind.weights // kind.width
        shape = (len(d) * groups, d.shape[1])
        s, m = d.new_ones(shape), d.new_full(shape, -1.0)
        dmin = fields["dmin"].t().contiguous() if kind.has_minimum else None
        if kind.scale_levels:
            s = fields["s"].t().float().contiguous()
            s = torch.where(s == 0, torch.ones_like(s), s)
            m = fields["m"].t().float().contiguous() if kind.has_minimum else m
        scales = d.repeat_interleave(groups, 0) * s
        uneven = values[1] - values[0] != 1
        found = ColumnState(
            values[codes.long()].t().contiguous(),
            scales,
            values[0].expand_as(scales),
            values[-1].expand_as(scales),
            values if uneven else None,
        )
        return cls(kind, found, d, s, dmin, m)

    def fields(self) -> dict[str, Tensor]:
        """Return the block's fields as a file stores them, [out, blocks or groups]."""
        fields = {"d": self.d.t().contiguous()}
        if self.dmin is not None:
            fields["dmin"] = self.dmin.t().contiguous()
        if self.kind.scale_levels:
            fields["s"] = self.s.t().to(torch.int16).contiguous()
            if self.dmin is not None:
                fields["m"] = self.m.t().to(torch.int16).contiguous()
        return fields

    def stored_codes(self) -> Tensor:
        """Return the codes as a file stores them, uint8 [out, in]."""
        steps = self.codes.steps.t()
        if self.codes.values is not None:
            return Nearest(self.codes.values).indices(steps.contiguous()).to(torch.uint8)
        return (steps - self.codes.low[0, 0]).to(torch.uint8).contiguous()

    def minimums(self) -> Tensor | None:
        """Return what is subtracted in each group, [groups, rows]."""
        if self.dmin is None:
            return None
        return self.dmin.repeat_interleave(self.kind.weights // self.kind.width, 0) * self.m

    def shifted(self, columns: Tensor) -> Tensor:
        """Return a weight [columns, rows] plus its groups' minimums."""
        minimums = self.minimums()
        if minimums is None:
            return columns
        return columns + minimums.repeat_interleave(self.kind.width, 0)

    def weight(self) -> Tensor:
        """Return the quantized weight, float32 [columns, rows]."""
        minimums = self.minimums()
        found = self.codes.weight()
        return found if minimums is None else found - minimums.repeat_interleave(self.kind.width, 0)

    def values(self, block: int) -> Tensor:
        """Return the values of a block, [weights, rows]."""
        width = self.kind.width
        groups = self.kind.weights // width
        span = slice(block * groups, (block + 1) * groups)
        columns = slice(block * self.kind.weights, (block + 1) * self.kind.weights)
        found = self.codes.steps[columns] * self.codes.scales[span].repeat_interleave(width, 0)
        if self.dmin is None:
            return found
        return found - (self.dmin[block] * self.m[span]).repeat_interleave(width, 0)

    def rows(self, rows: Tensor) -> BlockState:
        """Return a copy of some rows, int64."""
        d, s, m = (part[:, rows] for part in (self.d, self.s, self.m))
        dmin = None if self.dmin is None else self.dmin[:, rows]
        return BlockState(self.kind, self.codes.rows(rows), d, s, dmin, m)

    def put(self, rows: Tensor, state: BlockState) -> None:
        """Take up the codes and fields of some rows."""
        self.codes.put(rows, state.codes)
        self.d[:, rows], self.s[:, rows], self.m[:, rows] = state.d, state.s, state.m
        if self.dmin is not None and state.dmin is not None:
            self.dmin[:, rows] = state.dmin


def choose_in_order(
    columns: Tensor, states: Sequence[BlockState], factor: Tensor, order: Tensor
) -> None:
    """Choose the codes of every state by GPTQ's column loop; fields stay.

    Args:
        columns: W, float32 [columns, rows]; not modified.
        states: Changed.
        factor: Upper triangular inverse Cholesky factor, [columns, columns], in the order of work.
        order: Columns in that order, int64 [columns].

    Reference: GPTQ, arXiv:2210.17323, Algorithm 1.
    """
    rows = columns.shape[1]
    working = torch.cat([state.shifted(columns)[order] for state in states], 1)
    scales = torch.cat([state.codes.scales[order // state.kind.width] for state in states], 1)
    low = torch.cat([state.codes.low[0] for state in states])
    high = torch.cat([state.codes.high[0] for state in states])
    uneven = [
        (slice(place * rows, (place + 1) * rows), state.codes.values, Nearest(state.codes.values))
        for place, state in enumerate(states)
        if state.codes.values is not None
    ]

    def nearest(column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        wanted = column / scales[index]
        steps = wanted.round().clamp_(low, high)
        codes = steps - low
        for part, values, table in uneven:
            chosen = table.indices(wanted[part])
            steps[part], codes[part] = values[chosen], chosen.float()
        return codes, steps * scales[index]

    found = quantize_in_turn(working, nearest, factor, _BLOCK, len(states))
    inverse = torch.argsort(order)
    for state, codes in zip(states, found[inverse].tensor_split(len(states), 1), strict=True):
        values = state.codes.values
        steps = codes.float() + state.codes.low[0] if values is None else values[codes.long()]
        state.codes.steps = steps.contiguous()
