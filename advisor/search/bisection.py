"""Where a quality budget is just met: the predicted KL to try next, from what was measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_AIM = 0.96
_SMALLEST_STRAIN = 1e-3


def next_target(points: Sequence[tuple[float, float]]) -> float:
    """Return the predicted KL at which the quality budget should be just met.

    Measured strain follows predicted KL about as a power law: between two measurements on both
    sides of the budget it is interpolated, beyond them extrapolated with their slope.

    Args:
        points: (predicted KL, measured strain), at least one.
    """
    logs = sorted(
        (math.log(max(kl, 1e-12)), math.log(max(used, _SMALLEST_STRAIN))) for kl, used in points
    )
    aim = math.log(_AIM)
    below = [point for point in logs if point[1] <= aim]
    above = [point for point in logs if point[1] > aim]
    if below and above:
        (x0, y0), (x1, y1) = below[-1], above[0]
        if x1 > x0:
            return math.exp(x0 + (x1 - x0) * (aim - y0) / (y1 - y0))
    nearest = min(logs, key=lambda point: abs(point[1] - aim))
    slope = 1.0
    if len(logs) > 1:
        (x0, y0), (x1, y1) = logs[0], logs[-1]
        if x1 > x0:
            slope = min(2.0, max(0.5, (y1 - y0) / (x1 - x0)))
    step = (aim - nearest[1]) / slope
    return math.exp(nearest[0] + min(2.0, max(-2.0, step)))
