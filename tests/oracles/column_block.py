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


def _check(*tensors):
    """The kernels take rows that lie side by side."""
    assert all(tensor.stride(-1) == 1 for tensor in tensors)


def best_scales(distance, steps, scale, shares, diagonal, out):
    """Take the place of ``best_scales`` there: the least of a parabola in the scale of each row."""
    _check(distance, steps, scale, shares, diagonal, *out)
    weights, moves = steps.double(), distance.double()
    found = shares.double() @ weights
    out[0].copy_(found)
    for row in range(distance.shape[1]):
        curvature = float((weights[:, row] * diagonal.double() * found[:, row]).sum())
        slope = float((weights[:, row] * diagonal.double() * moves[:, row]).sum())
        out[1][row] = scale[row].double() + slope / curvature if curvature > 0 else float("nan")


def visit(distance, products, group, scales, shares, values):
    """Take the place of ``visit`` there: the better scale, then each step in turn."""
    weight, error, steps, scale, low, high = group
    _check(distance, products, *group, *scales, shares)
    columns, rows = distance.shape
    table = None if values is None else values.double()
    for row in range(rows):
        best, new, old = float(scales[0][row]), float(scales[1][row]), float(scale[row])
        unit = new if 0 < new < float("inf") and abs(new - best) < abs(old - best) else old
        left = (distance[:, row].double() + products[:, row].double() * (old - unit)) / unit
        for column in range(columns):
            start = float(steps[column, row])
            wanted = torch.tensor(start, dtype=torch.float64) + left[column]
            step = nearest(wanted, low[row].double(), high[row].double(), table)
            steps[column, row] = step
            error[column, row] = float(weight[column, row]) - float(step) * unit
            left[column + 1 :] += shares[column + 1 :, column].double() * (start - float(step))
        scale[row] = unit


class Kernels:
    """In the place of the module of kernels."""

    launch = staticmethod(launch)
    best_scales = staticmethod(best_scales)
    visit = staticmethod(visit)
