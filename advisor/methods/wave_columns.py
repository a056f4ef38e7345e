"""The inner loop of a wave front: the columns of one step, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.methods.columns_in_turn import round_in_turn

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.numerics.nearest import Nearest


def round_columns(
    current: Tensor,
    scale: Tensor,
    zero: Tensor,
    levels: Tensor,
    factor: Tensor,
    table: Nearest | None,
) -> tuple[Tensor, Tensor]:
    """Quantize columns in turn, updating those to come; return codes minus zeros, and errors.

    Args:
        current: [columns, blocks, rows], may be overwritten.
        scale: Shaped alike.
        zero: Shaped alike.
        levels: 2^bits - 1.
        factor: Of each block's columns, [blocks, columns, columns].
        table: Of the steps that there are, where they are not the whole numbers of a range.
    """
    steps, errors = torch.empty_like(current), torch.empty_like(current)
    low, high = -zero, levels - zero
    values = None if table is None else table.table
    if round_in_turn(current, (scale, low, high), factor, values, (steps, errors)):
        return steps, errors
    later = factor.permute(1, 2, 0).unsqueeze(3).contiguous()
    tensors = (current, scale, low, high, steps, errors)
    for column, rows in enumerate(zip(*(tensor.unbind() for tensor in tensors), strict=True)):
        value, unit, least, most, step, error = rows
        torch.div(value, unit, out=step)
        if table is None:
            torch.clamp(step.round_(), least, most, out=step)
        else:
            step.copy_(table.values(step))
        torch.addcmul(value, step, unit, value=-1, out=error)
        current[column + 1 :].addcmul_(later[column, column + 1 :], error, value=-1)
    return steps, errors
