"""Textbook twins of MX (OCP specification 1.0) and NVFP4, from their bit layouts; float64."""

from __future__ import annotations

import math


def minifloats(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> list[float]:
    """Non-negative values of a small float, by rising bit pattern; subnormals included."""
    values = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            share = mantissa / 2**mantissa_bits
            scale = 2.0 ** (max(exponent, 1) - bias)
            values.append((share if exponent == 0 else 1 + share) * scale)
    return [value for value in values if value <= largest]


E2M1 = minifloats(2, 1, 1, 6.0)
E4M3 = minifloats(4, 3, 7, 448.0)


def nearest(value: float, table: list[float]) -> float:
    """Round to nearest, ties to the even bit pattern, saturating."""
    size = min(abs(value), table[-1])
    code = min(range(len(table)), key=lambda code: (abs(table[code] - size), code % 2))
    return math.copysign(table[code], value)


def floor_log2(value: float) -> int:
    """Largest n with 2^n <= value, by trial."""
    power = 0
    while 2.0**power > value:
        power -= 1
    while 2.0 ** (power + 1) <= value:
        power += 1
    return power


def mx_block(values, table, rule: str = "ocp") -> tuple[float, list[float]]:
    """Scale and values of one block of 32, by a rule for the exponent.

    ``ocp``: the largest power of two not above the maximum, over the largest power of two of the
    element type. ``even``: the maximum is first rounded to two significant bits, ties up.
    ``ceil``: the smallest power of two with which nothing saturates.
    """
    largest = max(abs(value) for value in values)
    if largest == 0:
        return 2.0**-127, [0.0] * len(values)
    element = floor_log2(table[-1])
    exponent = floor_log2(largest) - element
    if rule == "even" and largest >= 1.75 * 2.0 ** floor_log2(largest):
        exponent += 1
    if rule == "ceil":
        exponent = -127
        while table[-1] * 2.0**exponent < largest:
            exponent += 1
    scale = 2.0 ** max(exponent, -127)
    return scale, [nearest(value / scale, table) * scale for value in values]


def mx_weight_block(values, table, importance=None) -> tuple[float, list[float]]:
    """Of the specification's exponent and the next one, that of less squared error."""
    scale, first = mx_block(values, table)
    found = []
    for candidate in (scale, min(2 * scale, 2.0**127)):
        rounded = [nearest(value / candidate, table) * candidate for value in values]
        shares = importance if importance is not None else [1.0] * len(values)
        error = sum(
            share * (value - near) ** 2
            for share, value, near in zip(shares, values, rounded, strict=True)
        )
        found.append((error, candidate, rounded))
    assert found[0][2] == first
    _, scale, rounded = min(found, key=lambda entry: entry[0])
    return scale, rounded


def nvfp4_block(values, global_scale: float) -> tuple[float, list[float]]:
    """E4M3 scale and values of one group of 16, read as element * scale / global scale."""
    largest = max(abs(value) for value in values)
    scale = nearest(largest / 6 * global_scale, E4M3) or E4M3[1]
    real = scale / global_scale
    return scale, [nearest(value / real, E2M1) * real for value in values]


def fp8_block(values) -> list[float]:
    """E4M3 values with one real scale: the largest magnitude over 448."""
    scale = max(abs(value) for value in values) / 448 or 1.0
    return [nearest(value / scale, E4M3) * scale for value in values]
