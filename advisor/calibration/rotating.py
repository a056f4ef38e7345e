"""Statistics of a model whose residual stream is rotated, in closed form from its own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.calibration.statistics import LayerStatistics
    from advisor.models.rotation import Rotation
    from advisor.modelspec import LinearSpec

_MEAN_MAGNITUDE = math.sqrt(2 / math.pi)
"""Of a standard normal variable."""


def rotated(rotation: Rotation, linear: LinearSpec, statistics: LayerStatistics) -> LayerStatistics:
    """Return a linear's statistics in the rotated model.

    Magnitudes of single channels do not follow from sums; they are those of a normal distribution
    of the same (weighted) variance, which what a rotation spreads comes close to: within a factor
    of two. Only calibrated scales of quantized inputs depend on them.
    """
    moment = rotation.second_moment(linear, statistics.second_moment)
    if moment is statistics.second_moment:
        maximum, total = statistics.absolute_maximum, statistics.absolute_sum
    else:
        seen = statistics.rows if statistics.rows > 0 else 1.0
        deviation = (moment.diagonal() / seen).clamp_min(0).sqrt()
        total = deviation * statistics.tokens * _MEAN_MAGNITUDE
        maximum = deviation * math.sqrt(2 * math.log(max(2, statistics.tokens)))
    gradient = statistics.gradient_moment
    return replace(
        statistics,
        second_moment=moment,
        absolute_maximum=maximum,
        absolute_sum=total,
        gradient_moment=None if gradient is None else rotation.gradient_moment(linear, gradient),
    )
