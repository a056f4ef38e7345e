"""The columns of a block in turn, in one launch of a Triton kernel.

Importing this needs Triton, which comes with torch's builds for GPUs; see
:mod:`advisor.methods.columns_in_turn`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 32
"""Rows that one program works on: about as many programs as a GPU has multiprocessors."""
_TO_WHOLE = tl.constexpr(12582912.0)
"""1.5 x 2^23: adding it leaves no room for a fraction, so that a float32 rounds to even."""


@triton.jit  # type: ignore[untyped-decorator]
def _in_turn(  # type: ignore[no-untyped-def] # Triton reads the annotations of constants alone
    current, origin, scale, low, high, factor, values, middles, steps, errors,
    rows, current_c, current_k, current_r, origin_c, origin_k, origin_r,
    scale_c, scale_k, scale_r, low_c, low_k, low_r, high_c, high_k, high_r,
    factor_k, factor_i, factor_j, steps_c, steps_k, steps_r, errors_c, errors_k, errors_r,
    MOVES: tl.constexpr, COUNT: tl.constexpr, columns: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(rows, ROWS)
    batch = tl.program_id(0) // parts
    row = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, WIDTH)
    place = current + column[:, None] * current_c + batch * current_k + row[None, :] * current_r
    tile = tl.load(place, mask=(column[:, None] < columns) & inside[None, :], other=0.0)
    for index in range(columns):
        value = tl.sum(tl.where(column[:, None] == index, tile, 0.0), axis=0)
        if MOVES:
            unit = 1.0
            start = tl.load(
                origin + index * origin_c + batch * origin_k + row * origin_r, inside, 0.0
            )
            wanted = start + value
        else:
            unit = tl.load(scale + index * scale_c + batch * scale_k + row * scale_r, inside, 1.0)
            start = value
            wanted = tl.div_rn(value, unit)
        if COUNT > 0:
            step = tl.zeros_like(wanted) + tl.load(values)
            for known in range(COUNT - 1):
                above = wanted > tl.load(middles + known)
                step = tl.where(above, tl.load(values + known + 1), step)
        else:
            least = tl.load(low + index * low_c + batch * low_k + row * low_r, inside, 0.0)
            most = tl.load(high + index * high_c + batch * high_k + row * high_r, inside, 0.0)
            step = tl.minimum(tl.maximum(wanted, least), most)
            step = (step + _TO_WHOLE) - _TO_WHOLE
        error = start - step * unit
        tl.store(steps + index * steps_c + batch * steps_k + row * steps_r, step, inside)
        tl.store(errors + index * errors_c + batch * errors_k + row * errors_r, error, inside)
        later = (column > index) & (column < columns)
        means = tl.load(
            factor + batch * factor_k + index * factor_i + column * factor_j, later, 0.0
        )
        change = means[:, None] * error[None, :]
        if MOVES:
            tile += change
        else:
            tile -= change


def launch(
    current: Tensor,
    origin: Tensor | None,
    limits: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    values: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> None:
    """Run the kernel.

    Args:
        current: float32 [columns, batches, rows], at most 128 columns; not modified.
        origin: As :func:`advisor.methods.columns_in_turn.move_in_turn` takes it, or None.
        limits: Scales, and the smallest and largest step, expanded to the shape of ``current``.
        factor: float32 [batches, columns, columns].
        values: Of the steps that there are, rising, or None for all whole numbers.
        out: Steps and errors, float32, shaped as ``current``; written.
    """
    columns, batches, rows = current.shape
    scale, low, high = limits
    steps, errors = out
    first = current if origin is None else origin
    known = current if values is None else values
    middles = current if values is None else (values[1:] + values[:-1]) / 2
    _in_turn[(batches * triton.cdiv(rows, _ROWS),)](
        current, first, scale, low, high, factor, known, middles, steps, errors, rows,
        *current.stride(), *first.stride(), *scale.stride(), *low.stride(), *high.stride(),
        *factor.stride(), *steps.stride(), *errors.stride(),
        MOVES=origin is not None, COUNT=0 if values is None else len(values),
        columns=columns, WIDTH=triton.next_power_of_2(columns), ROWS=_ROWS,
        num_warps=1 if columns <= 64 else 2,
    )  # fmt: skip
