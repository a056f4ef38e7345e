"""Columns one after the other, each knowing what became of those before it.

GPTQ, its wave front and coordinate descent all decide on a block of columns in turn: the nearest
step, what is left over, and what that means for the columns to come. A handful of torch calls per
column does that on a CPU; on a GPU every call costs a launch of some microseconds, whatever it
computes, so that a block runs there as one Triton kernel (:mod:`advisor.methods.column_kernels`).
Where Triton is missing or cannot compile, the torch calls run there too.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MOST_COLUMNS = 128
"""Of a block that one launch takes: they stay in a program's registers."""
_MOST_VALUES = 32
"""Steps of a codebook that a kernel looks through; the 253 of E4M3 go through torch."""
logger = logging.getLogger(__name__)


def round_in_turn(
    current: Tensor,
    limits: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    values: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> bool:
    """Round columns in turn, each error moving the columns to come: GPTQ's inner loop.

    ``step = nearest(current / scale)``, ``error = current - step x scale``, and ``current`` of
    every later column less ``factor`` times that error.

    Args:
        current: float32 [columns, batches, rows]; not modified.
        limits: Scales, smallest and largest step; float32, each expanding to ``current``'s shape.
        factor: Of each batch, [batches or 1, columns, columns]; the diagonal and what is below it
            are not read.
        values: Of the steps that there are, rising, where not all whole numbers between limits are.
        out: Steps and errors, float32, shaped as ``current``; written.

    Returns:
        Whether it was done: False, with nothing written, where there is no kernel for it.
    """
    return _run(current, None, limits, factor, values, out)


def move_in_turn(
    distance: Tensor,
    origin: Tensor,
    limits: tuple[Tensor, Tensor],
    shares: Tensor,
    values: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> bool:
    """Move the steps of columns in turn to where the error is least: the descent's inner loop.

    ``step = nearest(origin + distance)``, ``fallen = origin - step``, and ``distance`` of every
    later column plus its share of that.

    Args:
        distance: float32 [columns, rows]; not modified.
        origin: Steps as they are, shaped alike.
        limits: Smallest and largest step, [rows].
        shares: [columns, columns], its rows those that are moved.
        values: As :func:`round_in_turn` takes them.
        out: Steps, and by how much they have fallen, shaped as ``distance``; written.

    Returns:
        As :func:`round_in_turn` does.
    """
    low, high = limits
    return _run(
        distance[:, None], origin[:, None], (low, low, high), shares.t()[None], values,
        (out[0][:, None], out[1][:, None]),
    )  # fmt: skip


def visit_group(
    distance: Tensor,
    group: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    shares: Tensor,
    diagonal: Tensor,
    values: Tensor | None,
    round_scales: Callable[[Tensor], Tensor],
) -> bool:
    """Do all that the descent does to a group of columns.

    Args:
        distance: How far each weight should move, float32 [columns, rows], contiguous.
        group: Weights, errors (written), steps (changed), scales (changed), smallest and largest
            steps; [columns, rows] or [rows].
        shares: [columns, columns], of these columns.
        diagonal: [columns].
        values: As :func:`round_in_turn` takes them.
        round_scales: To what is stored.

    Returns:
        As :func:`round_in_turn` does.
    """
    if not _is_taken(distance, values):
        return False
    if any(part.stride(-1) != 1 for part in (*group, shares, diagonal)):
        return False  # the kernels take rows that lie side by side
    kernels, (_, _, steps, scale, _, _) = _kernels(), group
    products, best = torch.empty_like(distance), torch.empty_like(scale)
    kernels.best_scales(distance, steps, scale, shares, diagonal, (products, best))
    kernels.visit(distance, products, group, (best, round_scales(best)), shares, values)
    return True


def _run(
    current: Tensor,
    origin: Tensor | None,
    limits: tuple[Tensor, Tensor, Tensor],
    factor: Tensor,
    values: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> bool:
    if not _is_taken(current, values):
        return False
    scale, low, high = (limit.expand(current.shape) for limit in limits)
    factor = factor.expand(current.shape[1], -1, -1)
    _kernels().launch(current, origin, (scale, low, high), factor, values, out)
    return True


def _is_taken(columns: Tensor, values: Tensor | None) -> bool:
    """Return whether there is a kernel for so many columns and values."""
    few = values is None or len(values) <= _MOST_VALUES
    return has_kernels(columns.device) and len(columns) <= MOST_COLUMNS and few


@functools.lru_cache(maxsize=1)
def _kernels() -> Any:
    from advisor.methods import column_kernels

    return column_kernels


@functools.lru_cache
def has_kernels(device: torch.device) -> bool:
    """Return whether there are kernels for a device; a GPU's are tried once."""
    if device.type != "cuda":
        return False
    reason = why_no_kernels(device)
    if reason:
        logger.warning("codes are made on %s by many small calls, and slowly: %s", device, reason)
    return not reason


def why_no_kernels(device: torch.device) -> str:
    """Return why the kernels do not run on a GPU; empty where they do.

    Triton is a part of torch's builds for GPUs, and needs a C compiler.
    """
    try:
        correct = _tried(device)
    except Exception as error:  # whatever a compiler in any environment may raise
        return f"Triton: {str(error).strip().splitlines()[0] if str(error) else repr(error)}"
    return "" if correct else "Triton computes something else"


def _tried(device: torch.device) -> bool:
    """Run each kernel once; return whether they compute what is known beforehand."""
    current, one = torch.zeros(2, 1, 1, device=device), torch.ones(1, device=device)
    steps, errors = torch.zeros_like(current), torch.zeros_like(current)
    limits = (one.expand(2, 1, 1),) * 3
    _kernels().launch(current, None, limits, one.expand(1, 2, 2), None, (steps, errors))
    # One column of weight 2 at step 1 with scale 1: the best scale is 2, and the step stays.
    weight, step, scale = (torch.full((1, 1), value, device=device) for value in (2.0, 1.0, 1.0))
    distance, products, error = weight - 1, torch.zeros_like(weight), torch.ones_like(weight)
    best, low, high = torch.zeros_like(one), torch.zeros_like(one), 3 * one
    shares = one.view(1, 1)
    _kernels().best_scales(distance, step, scale[0], shares, one, (products, best))
    group = (weight, error, step, scale[0], low, high)
    _kernels().visit(distance, products, group, (best, best), shares, None)
    found = torch.stack([steps.min(), errors.min(), step[0, 0], scale[0, 0], error[0, 0]])
    return found.tolist() == [1.0, -1.0, 1.0, 2.0, 0.0]
