"""The columns of a block in turn, and a visit of the descent, as Triton kernels.

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
_VISITED_ROWS = 16
"""The same for a visit, which has the rows of one turn: an eighth of a linear's."""
_TO_WHOLE = tl.constexpr(12582912.0)
"""1.5 x 2^23: adding it leaves no room for a fraction, so that a float32 rounds to even."""


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(wanted, low, high, values, middles, inside, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the nearest of the values, or of the whole numbers from ``low`` to ``high``."""
    if COUNT > 0:
        step = tl.zeros_like(wanted) + tl.load(values)
        for known in range(COUNT - 1):
            above = wanted > tl.load(middles + known)
            step = tl.where(above, tl.load(values + known + 1), step)
    else:
        step = tl.maximum(wanted, tl.load(low, inside, 0.0))
        step = tl.minimum(step, tl.load(high, inside, 0.0))
        step = (step + _TO_WHOLE) - _TO_WHOLE
    return step


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
        least = low + index * low_c + batch * low_k + row * low_r
        most = high + index * high_c + batch * high_k + row * high_r
        step = _nearest(wanted, least, most, values, middles, inside, COUNT)
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


@triton.jit  # type: ignore[untyped-decorator]
def _best_scales(  # type: ignore[no-untyped-def]
    distance, steps, shares, diagonal, scale, products, best, rows, steps_c, shares_c,
    columns: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, WIDTH)
    known = column < columns
    found = tl.zeros((WIDTH, ROWS), dtype=tl.float32)
    for first in range(0, columns, 16):
        some = first + tl.arange(0, 16)
        mask = known[:, None] & (some[None, :] < columns)
        left = tl.load(shares + column[:, None] * shares_c + some[None, :], mask, 0.0)
        mask = (some[:, None] < columns) & inside[None, :]
        right = tl.load(steps + some[:, None] * steps_c + row[None, :], mask, 0.0)
        found += tl.dot(left, right, input_precision="ieee")
    mask = known[:, None] & inside[None, :]
    weighted = tl.load(steps + column[:, None] * steps_c + row[None, :], mask, 0.0)
    weighted *= tl.load(diagonal + column, known, 0.0)[:, None]
    far = tl.load(distance + column[:, None] * rows + row[None, :], mask, 0.0)
    curvature = tl.sum(weighted * found, axis=0)
    slope = tl.sum(weighted * far, axis=0)
    old = tl.load(scale + row, inside, 1.0)
    wanted = old + slope / tl.maximum(curvature, 1e-30)
    tl.store(products + column[:, None] * rows + row[None, :], found, mask)
    tl.store(best + row, tl.where(curvature > 0, wanted, float("nan")), inside)


@triton.jit  # type: ignore[untyped-decorator]
def _visit(  # type: ignore[no-untyped-def]
    distance, products, weight, error, steps, scale, best, rounded, low, high, shares, values,
    middles, rows, weight_c, error_c, steps_c, shares_c,
    COUNT: tl.constexpr, columns: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    column = tl.arange(0, WIDTH)
    mask = (column[:, None] < columns) & inside[None, :]
    old, wanted = tl.load(scale + row, inside, 1.0), tl.load(best + row, inside, 1.0)
    new = tl.load(rounded + row, inside, 1.0)
    better = (new > 0) & (new < float("inf")) & (tl.abs(new - wanted) < tl.abs(old - wanted))
    unit = tl.where(better, new, old)
    tile = tl.load(distance + column[:, None] * rows + row[None, :], mask, 0.0)
    moved = tl.load(products + column[:, None] * rows + row[None, :], mask, 0.0)
    tile = (tile + moved * (old - unit)[None, :]) / unit[None, :]
    for index in range(columns):
        value = tl.sum(tl.where(column[:, None] == index, tile, 0.0), axis=0)
        start = tl.load(steps + index * steps_c + row, inside, 0.0)
        step = _nearest(start + value, low + row, high + row, values, middles, inside, COUNT)
        fallen = start - step
        aim = tl.load(weight + index * weight_c + row, inside, 0.0)
        tl.store(steps + index * steps_c + row, step, inside)
        tl.store(error + index * error_c + row, aim - step * unit, inside)
        later = (column > index) & (column < columns)
        means = tl.load(shares + column * shares_c + index, later, 0.0)
        tile += means[:, None] * fallen[None, :]
    tl.store(scale + row, unit, inside)


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
    known, middles = _table(values, current)
    _in_turn[(batches * triton.cdiv(rows, _ROWS),)](
        current, first, scale, low, high, factor, known, middles, steps, errors, rows,
        *current.stride(), *first.stride(), *scale.stride(), *low.stride(), *high.stride(),
        *factor.stride(), *steps.stride(), *errors.stride(),
        MOVES=origin is not None, COUNT=0 if values is None else len(values),
        columns=columns, WIDTH=triton.next_power_of_2(columns), ROWS=_ROWS,
        num_warps=1 if columns <= 64 else 2,
    )  # fmt: skip


def best_scales(
    distance: Tensor,
    steps: Tensor,
    scale: Tensor,
    shares: Tensor,
    diagonal: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """Compute what :func:`advisor.methods.descent_steps.rescale` needs of a group.

    Args:
        distance: float32 [columns, rows], contiguous.
        steps: [columns, rows], the rows side by side.
        scale: [rows].
        shares: [columns, columns], of these columns.
        diagonal: [columns].
        out: The shares times the steps, as ``distance``; and the best scales, [rows], NaN where the
            steps say nothing of them.
    """
    columns, rows = distance.shape
    _best_scales[(triton.cdiv(rows, _VISITED_ROWS),)](
        distance, steps, shares, diagonal, scale, *out, rows, steps.stride(0), shares.stride(0),
        columns=columns, WIDTH=_width(columns), ROWS=_VISITED_ROWS,
        num_warps=1 if columns <= 32 else 4,
    )  # fmt: skip


def visit(
    distance: Tensor,
    products: Tensor,
    group: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    scales: tuple[Tensor, Tensor],
    shares: Tensor,
    values: Tensor | None,
) -> None:
    """Take a group's scales where they are better, and choose its steps in turn.

    Args:
        distance: As :func:`best_scales` takes it.
        products: As it gives them.
        group: Weights, errors (written), steps (changed), scales (changed), smallest and largest
            steps of the group: [columns, rows] or [rows].
        scales: The best ones and those as they would be stored, [rows].
        shares: As :func:`best_scales` takes them.
        values: As :func:`launch` does.
    """
    columns, rows = distance.shape
    weight, error, steps, scale, low, high = group
    _visit[(triton.cdiv(rows, _VISITED_ROWS),)](
        distance, products, weight, error, steps, scale, *scales, low, high, shares,
        *_table(values, distance), rows, weight.stride(0), error.stride(0), steps.stride(0),
        shares.stride(0), COUNT=0 if values is None else len(values), columns=columns,
        WIDTH=_width(columns), ROWS=_VISITED_ROWS, num_warps=1 if columns <= 64 else 2,
    )  # fmt: skip


def _table(values: Tensor | None, other: Tensor) -> tuple[Tensor, Tensor]:
    """Return values and the middles between them, or what a kernel does not look at."""
    return (other, other) if values is None else (values, (values[1:] + values[:-1]) / 2)


def _width(columns: int) -> int:
    """Return the power of two that columns are filled up to, 16 at least."""
    return max(16, int(triton.next_power_of_2(columns)))
