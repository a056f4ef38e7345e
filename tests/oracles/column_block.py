"""A block of columns in turn, in float64: what the kernels of GPUs compute."""

from __future__ import annotations

import torch


def nearest(wanted, low, high, values):
    if values is None:
        return torch.minimum(torch.maximum(torch.round(wanted), low), high)
    distances = (wanted.unsqueeze(-1) - values).abs()
    return values[distances.argmin(-1)]


def launch(current, origin, limits, factor, values, out):
    """Take the place of ``advisor.methods.column_kernels.launch``; one number at a time."""
    columns, batches, _ = current.shape
    scale, low, high = (limit.double() for limit in limits)
    values = None if values is None else values.double()
    left = current.double().clone()
    for batch in range(batches):
        for column in range(columns):
            here = (column, batch)
            if origin is None:
                step = nearest(left[here] / scale[here], low[here], high[here], values)
                error, sign = left[here] - step * scale[here], -1.0
            else:
                start = origin[here].double()
                step = nearest(start + left[here], low[here], high[here], values)
                error, sign = start - step, 1.0
            out[0][here], out[1][here] = step, error
            for later in range(column + 1, columns):
                left[later, batch] += sign * float(factor[batch, column, later]) * error
