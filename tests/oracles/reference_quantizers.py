"""Textbook twins of the integer quantizers: float64, explicit loops, written from the papers.

Nothing here is fast or shared with the package. A weight is a list of rows [out][in]; inputs X are
[tokens][in]. Every chosen code comes with its distance to the nearest rounding tie, in steps of
the grid, so that a test can tell a mistake from a value that float32 rounds the other way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

_SIGNIFICAND_BITS = {"float32": 24, "float16": 11, "bfloat16": 8}
_SMALLEST_NORMAL_EXPONENT = {"float32": -125, "float16": -13, "bfloat16": -125}


def round_to(value: float, dtype: str) -> float:
    """Round a number to a floating point type, ties to even (IEEE 754), without overflow."""
    if value == 0.0:
        return 0.0
    _, exponent = math.frexp(value)
    exponent = max(exponent, _SMALLEST_NORMAL_EXPONENT[dtype])
    unit = math.ldexp(1.0, exponent - _SIGNIFICAND_BITS[dtype])
    return round(value / unit) * unit


@dataclass(frozen=True)
class Grid:
    """Settings of an integer grid; codes run from 0 to 2^bits - 1."""

    bits: int
    symmetric: bool
    scale_dtype: str = "float32"

    def fit(self, low: float, high: float) -> tuple[float, int]:
        """Return scale and zero point for a range of weights."""
        levels = 2**self.bits - 1
        if self.symmetric:
            scale = round_to(2 * max(abs(low), abs(high)) / levels, self.scale_dtype)
            return (scale or 1.0), 2 ** (self.bits - 1)
        low, high = min(low, 0.0), max(high, 0.0)
        scale = round_to((high - low) / levels, self.scale_dtype) or 1.0
        return scale, min(max(round(-low / scale), 0), levels)

    def encode(self, value: float, scale: float, zero: int) -> tuple[int, float]:
        """Return the nearest code and how far the value is from a tie that could change it."""
        steps = value / scale
        code = round(steps) + zero
        top = 2**self.bits - 1
        margin = abs(abs(steps - math.floor(steps)) - 0.5)
        if code < 0 or code > top:
            # Far outside the grid no tie can bring another code.
            margin = max(margin, min(abs(code), abs(code - top)) - 0.5)
        return min(max(code, 0), top), margin


@dataclass
class Reference:
    """What an oracle chose: [out][in] codes and margins, [out][groups] scales and zero points."""

    codes: np.ndarray
    margins: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray
    ranges: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    @classmethod
    def empty(cls, rows: int, columns: int, width: int) -> Reference:
        groups = columns // width
        return cls(
            codes=np.zeros((rows, columns), dtype=np.int64),
            margins=np.zeros((rows, columns)),
            scales=np.zeros((rows, groups)),
            zeros=np.zeros((rows, groups), dtype=np.int64),
            group_of=np.arange(columns) // width,
        )

    def dequantize(self) -> np.ndarray:
        rows, columns = self.codes.shape
        values = np.zeros((rows, columns))
        for row in range(rows):
            for column in range(columns):
                group = self.group_of[column]
                steps = int(self.codes[row, column]) - int(self.zeros[row, group])
                values[row, column] = self.scales[row, group] * steps
        return values


def _spread(values: list[float], grid: Grid, factor: float) -> tuple[float, int, list[float]]:
    """Scale, zero point and errors of a group whose range is shrunk by a factor."""
    scale, zero = grid.fit(factor * min(values), factor * max(values))
    errors = []
    for value in values:
        code, _ = grid.encode(value, scale, zero)
        errors.append(scale * (code - zero) - value)
    return scale, zero, errors


def clip_factors(steps: int, shrink: float, bits: int, width: int) -> list[float]:
    """Shares of the range that a clip search tries, largest first.

    ``shrink`` is for 2 bits in groups of up to 64; longer ones have larger outliers. None for 8.
    """
    if bits >= 8:
        return [1.0]
    shrink = 1 - (1 - shrink) * 2 / bits
    if width > 64:
        shrink *= math.sqrt(math.log(64) / math.log(width))
    return [1 - (1 - shrink) * step / (steps - 1) for step in range(steps)]


def clipped_grid(values, grid, factors, loss) -> tuple[float, int, list[float]]:
    """Return the first of the shrunk grids with least loss(errors), and all the losses."""
    best, losses = None, []
    for factor in factors:
        scale, zero, errors = _spread(values, grid, factor)
        losses.append(loss(errors))
        if best is None or losses[-1] < best[0]:
            best = (losses[-1], scale, zero)
    return best[1], best[2], losses


def rtn(weight, grid: Grid, width: int, *, factors=(1.0,), importance=None) -> Reference:
    """Round to nearest, per group of ``width`` inputs; weighted squared error where clipped."""
    rows, columns = weight.shape
    result = Reference.empty(rows, columns, width)
    for row in range(rows):
        for group in range(columns // width):
            members = range(group * width, (group + 1) * width)
            values = [float(weight[row, column]) for column in members]
            shares = [1.0 if importance is None else float(importance[c]) for c in members]

            def loss(errors, shares=shares):
                return sum(share * error**2 for share, error in zip(shares, errors, strict=True))

            scale, zero, losses = clipped_grid(values, grid, factors, loss)
            _store(result, row, group, scale, zero)
            result.ranges[row, group] = losses
            for column in members:
                _encode(result, grid, row, column, float(weight[row, column]))
    return result


def _store(result: Reference, row: int, group: int, scale: float, zero: int) -> None:
    result.scales[row, group], result.zeros[row, group] = scale, zero


def _encode(result: Reference, grid: Grid, row: int, column: int, value: float) -> float:
    """Choose one code in its group's grid and return the dequantized weight."""
    group = result.group_of[column]
    scale, zero = float(result.scales[row, group]), int(result.zeros[row, group])
    code, margin = grid.encode(value, scale, zero)
    result.codes[row, column], result.margins[row, column] = code, margin
    return scale * (code - zero)


def activation_order(second_moment) -> list[int]:
    """Columns by falling diagonal of H; equal ones keep their order."""
    return sorted(range(len(second_moment)), key=lambda column: -second_moment[column][column])


def gptq(
    weight,
    second_moment,
    grid,
    width,
    *,
    damping=0.01,
    order=None,
    static=False,
    factors=(1.0,),
    scales=None,
) -> Reference:
    """GPTQ, Algorithm 1 with blocks of one column, as the OBQ steps that it is derived from.

    The inverse Hessian is kept explicitly and a quantized column removed from it by one step of
    Gaussian elimination (equations 2 and 3 of the paper), without any Cholesky factor.

    Args:
        order: Columns in the order of work (activation order), or None for their own order.
        static: With an order: groups of consecutive columns, with scales from the weight as it
            was; otherwise groups are neighbours in the order.
        scales: Scales and zero points to keep, with ``static``.
    """
    weight = np.array(weight, dtype=np.float64)
    moment = np.array(second_moment, dtype=np.float64)
    rows, columns = weight.shape
    order = list(range(columns)) if order is None else list(order)
    result = Reference.empty(rows, columns, width)
    mean_diagonal = sum(moment[i, i] for i in range(columns)) / columns
    damped = moment + damping * mean_diagonal * np.eye(columns)
    left = variances_left(damped, order)
    if static:
        before = rtn(weight, grid, width, factors=factors, importance=left)
        result.scales, result.zeros, result.ranges = before.scales, before.zeros, before.ranges
        if scales is not None:
            result.scales, result.zeros = scales
    else:
        for place, column in enumerate(order):
            result.group_of[column] = place // width

    inverse = np.linalg.inv(damped)
    remaining = list(order)
    for place, column in enumerate(order):
        remaining.remove(column)
        if not static and place % width == 0:
            members = order[place : place + width]
            _fit_group(result, weight, left, grid, place // width, members, factors)
        for row in range(rows):
            rounded = _encode(result, grid, row, column, float(weight[row, column]))
            error = (weight[row, column] - rounded) / inverse[column, column]
            for other in remaining:
                weight[row, other] -= error * inverse[column, other]
        pivot = inverse[column, column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column, :]) / pivot
    return result


def variances_left(moment, order) -> np.ndarray:
    """What of each input the inputs that come later in the order do not explain, by regression."""
    left = np.empty(len(moment))
    for place, column in enumerate(order):
        later = order[place + 1 :]
        cross = moment[later, column]
        explained = np.linalg.solve(moment[np.ix_(later, later)], cross) if later else cross
        left[column] = moment[column, column] - cross @ explained
    return left


def _fit_group(result, weight, left, grid, group, members, factors) -> None:
    """Choose a group's scales from the weights as updated so far."""
    for row in range(weight.shape[0]):
        values = [float(weight[row, member]) for member in members]

        def loss(errors):
            pairs = zip(members, errors, strict=True)
            return sum(left[member] * error**2 for member, error in pairs)

        scale, zero, losses = clipped_grid(values, grid, factors, loss)
        result.ranges[row, group] = losses
        _store(result, row, group, scale, zero)


def output_error(delta, inputs) -> float:
    """Sum over tokens of the squared norm of (changed - reference) outputs, from the inputs."""
    total = 0.0
    for token in inputs:
        for row in delta:
            total += math.fsum(float(w) * float(x) for w, x in zip(row, token, strict=True)) ** 2
    return total


def awq_scales(magnitude, alpha: float) -> np.ndarray:
    """Equation 5: s = mean|x|^alpha, here with sqrt(max * min) = 1 over live inputs."""
    live = [value for value in magnitude if value > 0]
    powers = [value**alpha if value > 0 else None for value in magnitude]
    middle = math.sqrt(max(live) ** alpha * min(live) ** alpha)
    return np.array([1.0 if power is None else power / middle for power in powers])


def awq_search(weights, inputs, grid: Grid, width: int, alphas) -> list[float]:
    """Equation 4 for every alpha: ||Q(W diag(s)) (diag(s)^-1 X) - W X||^2 on the raw inputs."""
    magnitude = np.abs(inputs).mean(axis=0)
    errors = []
    for alpha in alphas:
        scales = awq_scales(magnitude, alpha)
        total = 0.0
        for weight in weights:
            rounded = rtn(weight * scales, grid, width).dequantize()
            # The scaled input x / s meets the rounded weight; their product is what counts.
            total += float((((inputs / scales) @ rounded.T - inputs @ weight.T) ** 2).sum())
        errors.append(total)
    return errors


def awq_clip(weight, inputs, grid: Grid, width: int, factors) -> Reference:
    """Shrink each group's range by its own output error on the inputs; keep only better rows."""
    plain = rtn(weight, grid, width)
    rows, columns = weight.shape
    result = Reference.empty(rows, columns, width)
    for row in range(rows):
        for group in range(columns // width):
            members = list(range(group * width, (group + 1) * width))
            part = inputs[:, members]

            def loss(errors, part=part):
                return float(((part @ np.array(errors)) ** 2).sum())

            values = [float(weight[row, column]) for column in members]
            scale, zero, losses = clipped_grid(values, grid, factors, loss)
            result.ranges[row, group] = losses
            _store(result, row, group, scale, zero)
        for column in range(columns):
            _encode(result, grid, row, column, float(weight[row, column]))
    clipped = ((inputs @ (result.dequantize() - weight).T) ** 2).sum(axis=0)
    whole = ((inputs @ (plain.dequantize() - weight).T) ** 2).sum(axis=0)
    for row in range(rows):
        if clipped[row] >= whole[row]:
            for name in ("codes", "margins", "scales", "zeros"):
                getattr(result, name)[row] = getattr(plain, name)[row]
    return result


def smoothquant_scales(weights, inputs, alpha: float) -> np.ndarray:
    """SmoothQuant, equation 4: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha); 1 where one is 0."""
    scales = []
    for column in range(inputs.shape[1]):
        activation = max(abs(float(token[column])) for token in inputs)
        weight = max(abs(float(row[column])) for matrix in weights for row in matrix)
        defined = activation > 0 and weight > 0
        scales.append(activation**alpha / weight ** (1 - alpha) if defined else 1.0)
    return np.array(scales)


def kl_second_order(delta, inputs, gradients) -> float:
    """½ mean over inputs x and gradients g of (g · ΔW x)², each pair of them on its own."""
    total = 0.0
    for token in inputs:
        change = [math.fsum(float(w) * float(x) for w, x in zip(row, token, strict=True))
                  for row in delta]  # fmt: skip
        for gradient in gradients:
            total += math.fsum(float(g) * c for g, c in zip(gradient, change, strict=True)) ** 2
    return 0.5 * total / (len(inputs) * len(gradients))


def brain_surgery(target, moment, scales, grid):
    """Optimal brain surgeon: after each rounding the best change of all weights still free."""
    target, result = target.copy(), np.zeros_like(target)
    inverse = np.linalg.inv(moment)
    for column in np.argsort(-np.diag(moment), kind="stable"):
        values = scales[:, column, None] * grid
        nearest = np.abs(values - target[:, column, None]).argmin(1)
        result[:, column] = values[np.arange(len(target)), nearest]
        error = (target[:, column] - result[:, column]) / inverse[column, column]
        target -= np.outer(error, inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return result
