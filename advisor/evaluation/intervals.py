"""Confidence intervals of means over sequences, without scipy."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from advisor.errors import InputError
from advisor.plan.schema import Interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONFIDENCE = 0.95
_FRACTION_STEPS = 500
_TINY = 1e-300


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function, by Lentz's method."""
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1.0) or _TINY)
    result = d
    for step in range(1, _FRACTION_STEPS):
        even = step * (b - step) * x / ((a + 2 * step - 1) * (a + 2 * step))
        odd = -(a + step) * (a + b + step) * x / ((a + 2 * step) * (a + 2 * step + 1))
        for term in (even, odd):
            d = 1.0 / (1.0 + term * d or _TINY)
            c = 1.0 + term / c or _TINY
            result *= d * c
        if abs(d * c - 1.0) < 1e-15:
            break
    return result


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b)."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0.0 else 1.0
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = math.exp(logarithm + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1.0) / (a + b + 2.0):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1.0 - x) / b


@functools.lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: In (0, 1).
        degrees: Degrees of freedom, at least 1.

    Raises:
        InputError: An argument is outside its range.
    """
    if not 0.0 < probability < 1.0 or degrees < 1:
        raise InputError(
            "a t quantile needs 0 < probability < 1 and degrees >= 1, but got "
            f"{probability} and {degrees}."
        )
    if probability == 0.5:
        return 0.0
    tail = min(probability, 1.0 - probability)
    # P(|T| > t) = I_x(degrees / 2, 1 / 2) with x = degrees / (degrees + t^2), which falls with t.
    low, high = 0.0, 1.0
    while _two_tails(high, degrees) > 2 * tail:
        high *= 2.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        if _two_tails(middle, degrees) > 2 * tail:
            low = middle
        else:
            high = middle
        if high - low <= 1e-14 * high:
            break
    return math.copysign(0.5 * (low + high), probability - 0.5)


def _two_tails(t: float, degrees: int) -> float:
    return _incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t))


def mean_interval(
    values: Sequence[float] | NDArray[np.float64], confidence: float = CONFIDENCE
) -> Interval:
    """Return the mean of independent values and its two-sided t interval.

    For a paired comparison give the differences. One value has an infinite interval.

    Raises:
        InputError: There is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise InputError("an interval needs at least one sequence, but there is none.")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(value=mean, low=-math.inf, high=math.inf)
    error = float(sample.std(ddof=1)) / math.sqrt(sample.size)
    half = t_quantile(0.5 + confidence / 2.0, sample.size - 1) * error
    return Interval(value=mean, low=mean - half, high=mean + half)


def guarded_interval(
    values: Sequence[float] | NDArray[np.float64], confidence: float = CONFIDENCE
) -> Interval:
    """Return the union of the t interval and its skewness-corrected form, for decisions.

    Losses of sequences have a long upper tail, and then a t interval's upper end is too low too
    often: with 24 exponential values it lies below the true mean in 7% of samples instead of 2.5%.
    Hall's transformation of t removes the leading effect of skewness.

    Reference:
        Hall, On the removal of skewness by transformation (1992), section 3.
    """
    plain = mean_interval(values, confidence)
    sample = np.asarray(values, dtype=np.float64)
    count, spread = sample.size, float(sample.std())
    if count < 3 or spread <= 0.0:
        return plain
    skewness = float((((sample - sample.mean()) / spread) ** 3).mean())
    if abs(skewness) < 1e-6:
        return plain
    quantile = t_quantile(0.5 + confidence / 2.0, count - 1)
    root = math.sqrt(count)

    def inverse(y: float) -> float:
        inside = 1.0 + skewness * (y / root - skewness / (6.0 * count))
        return 3.0 * root / skewness * (math.copysign(abs(inside) ** (1 / 3), inside) - 1.0)

    error = float(sample.std(ddof=1)) / root
    return Interval(
        value=plain.value,
        low=min(plain.low, plain.value - error * inverse(quantile)),
        high=max(plain.high, plain.value - error * inverse(-quantile)),
    )


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64],
    confidence: float = CONFIDENCE,
    *,
    resamples: int = 10000,
    seed: int = 0,
) -> Interval:
    """Return the mean and its percentile bootstrap interval over independent values.

    Differs from :func:`mean_interval`: no normality is assumed, but with fewer than about 20
    sequences it is too narrow.

    Raises:
        InputError: There is no value.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise InputError("an interval needs at least one sequence, but there is none.")
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(sample.size, np.full(sample.size, 1 / sample.size), resamples)
    means = counts @ sample / sample.size
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(value=float(sample.mean()), low=float(low), high=float(high))
