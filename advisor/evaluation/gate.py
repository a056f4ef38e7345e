"""The gate: a budget on loss or KL is met, missed, or needs more text to tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from advisor.errors import InputError
from advisor.evaluation.intervals import CONFIDENCE, guarded_interval, t_quantile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from advisor.budgets import Budgets
    from advisor.evaluation.measure import Measurement


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a measured candidate meets its budgets.

    Attributes:
        verdict: ``pass``, ``fail`` or ``undecided``.
        reason: The number that decided, in one line.
        more_sequences: About how many more sequences would decide; None when decided, or when
            the mean lies so close to the budget that no number can be named.
    """

    verdict: Literal["pass", "fail", "undecided"]
    reason: str
    more_sequences: int | None = None


def decide(measurement: Measurement, budgets: Budgets, *, looks: int = 1) -> Decision:
    """Decide the budgets on loss and KL from a measurement.

    A budget is met only if the upper end of the two-sided 95% interval, corrected for skewness,
    meets it; it is missed if the lower end is above it. A candidate exactly at its budget is then
    accepted by chance in 2.5% of measurements, and in less than 5% also where the losses of
    sequences are as skewed as an exponential distribution (simulated in the tests).

    Args:
        measurement: Per-sequence results; sequences are taken as independent.
        budgets: Limits; those on size, memory, speed and tasks are not decided here.
        looks: How often the same growing measurement is decided on; the error is shared out
            among the looks (Bonferroni), so that growing the text until it decides stays honest.

    Raises:
        InputError: ``looks`` is not positive.
    """
    if looks < 1:
        raise InputError(f"looks must be at least 1, but got {looks}.")
    confidence = 1.0 - (1.0 - CONFIDENCE) / looks
    parts = []
    if budgets.max_loss is not None:
        # Decided on the mean difference of log-likelihoods, where the interval is symmetric.
        differences = measurement.sequence_nll - measurement.sequence_reference_nll
        limit = math.log1p(budgets.max_loss)
        parts.append(_decide("loss", differences, limit, confidence, as_loss=True))
    if budgets.max_kl is not None:
        parts.append(
            _decide("KL", measurement.sequence_kl, budgets.max_kl, confidence, as_loss=False)
        )
    if not parts:
        return Decision("pass", "no budget on loss or KL")
    for verdict in ("fail", "undecided"):
        found = [part for part in parts if part.verdict == verdict]
        if found:
            known = [part.more_sequences for part in found]
            numbers = [number for number in known if number is not None]
            more = max(numbers) if numbers and len(numbers) == len(known) else None
            return Decision(found[0].verdict, "; ".join(part.reason for part in found), more)
    return Decision("pass", "; ".join(part.reason for part in parts))


def _decide(
    name: str, values: NDArray[np.float64], limit: float, confidence: float, *, as_loss: bool
) -> Decision:
    """Decide one budget on a mean of per-sequence values."""
    interval = guarded_interval(values, confidence)

    def show(value: float) -> str:
        if not math.isfinite(value):
            return "unbounded"
        return f"{math.expm1(min(value, 700.0)):.2%}" if as_loss else f"{value:.4f}"

    span = f"{name} {show(interval.value)} ({show(interval.low)} to {show(interval.high)})"
    if interval.high <= limit:
        return Decision("pass", f"{span} meets {show(limit)}")
    if interval.low > limit:
        return Decision("fail", f"{span} exceeds {show(limit)}")
    more = _more_sequences(values, limit, confidence)
    needs = f": needs about {more} more sequences" if more is not None else ""
    return Decision("undecided", f"{span} is undecided at {show(limit)}{needs}", more)


_MOST_SEQUENCES = 1_000_000


def _more_sequences(values: NDArray[np.float64], limit: float, confidence: float) -> int | None:
    """Return how many more values would bring the interval to one side of the limit."""
    if len(values) < 2:
        return None
    gap = abs(limit - float(values.mean()))
    spread = float(values.std(ddof=1))
    if gap <= 0.0 or not math.isfinite(gap):
        return None
    count = len(values)
    # The t quantile falls as the count grows, so a few rounds settle it.
    for _ in range(20):
        needed = math.ceil((t_quantile(0.5 + confidence / 2, count - 1) * spread / gap) ** 2)
        if needed > _MOST_SEQUENCES:
            return None
        if needed == count:
            break
        count = max(needed, 2)
    return max(count - len(values), 1)
