"""The gate: a budget on loss, KL or accuracy is met, missed, or needs more text to tell."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from advisor.errors import InputError
from advisor.evaluation.intervals import CONFIDENCE, guarded_interval, t_quantile

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from advisor.budgets import Budgets
    from advisor.evaluation.measure import Measurement
    from advisor.evaluation.tasks import TaskMeasurement
    from advisor.plan.schema import Interval


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a measured candidate meets its budgets.

    Attributes:
        verdict: ``pass``, ``fail`` or ``undecided``; ``stopped`` where the measurement ended early
            as the candidate could no longer be the answer.
        reason: The number that decided, in one line.
        more_sequences: About how many more sequences would decide; None when decided, or when
            the mean lies so close to the budget that no number can be named.
    """

    verdict: Literal["pass", "fail", "undecided", "stopped"]
    reason: str
    more_sequences: int | None = None


_ERROR = 0.01
"""On the side of a false accept: of the first look, and again of all later ones."""


def look_confidence(look: int, looks: int) -> float:
    """Return the confidence of one look at a measurement that grows until it decides.

    The first look takes 98% (1% on the side of a false accept), the later ones share another 1%; a
    single look takes both. That is stricter than the 5% promised, as the KL of real sequences is
    more skewed than the interval corrects for: of 302 measured sequences of the small trained
    model, drawn anew, eight candidates exactly at their budget were accepted in 6.9% when 2.5%
    and 2.5% were spent over looks at 32 to 256 sequences, in 4.9% with 1.5% and 1.5%.

    Args:
        look: Number of this look, from 1.
        looks: How many there may be.

    Raises:
        InputError: There is no such look.
    """
    if not 1 <= look <= looks:
        raise InputError(f"a look must be between 1 and {looks}, but got {look}.")
    if looks == 1:
        return 1.0 - 4 * _ERROR
    return 1.0 - 2 * _ERROR if look == 1 else 1.0 - 2 * _ERROR / (looks - 1)


def holm(passes_at: Sequence[Callable[[float], bool]]) -> list[float]:
    """Return at what share of its error each of several candidates is to be decided.

    One search gates several candidates and answers with one that passed. Were each accepted
    falsely in 5% of measurements, an answer would be wrong more often. Holm's procedure keeps the
    chance that any is accepted falsely at that of one: with ``n`` candidates not yet accepted,
    each is decided at a share 1/n of the error, and whoever passes leaves the others a larger
    share. Sure passes therefore cost the close ones nothing.

    Args:
        passes_at: For each candidate, whether it passes at a share of the error, in (0, 1].

    Returns:
        Shares, in the candidates' order: of those that pass, the share at which they did.

    Reference:
        Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    shares: dict[int, float] = {}
    while len(shares) < len(passes_at):
        share = 1.0 / (len(passes_at) - len(shares))
        left = [place for place in range(len(passes_at)) if place not in shares]
        accepted = [place for place in left if passes_at[place](share)]
        if not accepted:
            return [shares.get(place, share) for place in range(len(passes_at))]
        shares |= dict.fromkeys(accepted, share)
    return [shares[place] for place in range(len(passes_at))]


def decide(
    measurement: Measurement,
    budgets: Budgets,
    *,
    slices: Mapping[str, Measurement] | None = None,
    task: TaskMeasurement | None = None,
    confidence: float = CONFIDENCE,
) -> Decision:
    """Decide the budgets on loss, KL and accuracy from what was measured.

    A budget is met only if the upper end of the two-sided interval, corrected for skewness, meets
    it, on every text; it is missed if the lower end is above it on any. A candidate exactly at its
    budget is then accepted by chance in 2.5% of measurements, and in less than 5% also where the
    losses of sequences are as skewed as an exponential distribution (simulated in the tests).

    Args:
        measurement: Per-sequence results; sequences are taken as independent.
        budgets: Limits; those on size, memory and speed are not decided here.
        slices: Results on further texts, by name; each must meet the budgets on its own.
        task: Results on the benchmark, where the budgets speak of one.
        confidence: Of the intervals.
    """
    parts = []
    for name, measured in {"": measurement, **(slices or {})}.items():
        suffix = f" on {name}" if name else ""
        if budgets.max_loss is not None:
            # Decided on the mean difference of log-likelihoods, where the interval is symmetric.
            differences = measured.sequence_nll - measured.sequence_reference_nll
            limit = math.log1p(budgets.max_loss)
            interval = guarded_interval(differences, confidence)
            more = _more_sequences(differences, limit, confidence)
            parts.append(_decide(f"loss{suffix}", interval, limit, _loss, more))
        if budgets.max_kl is not None:
            values = measured.sequence_kl
            interval = guarded_interval(values, confidence)
            more = _more_sequences(values, budgets.max_kl, confidence)
            parts.append(_decide(f"KL{suffix}", interval, budgets.max_kl, _plain, more))
    if budgets.max_accuracy_drop is not None and task is not None:
        parts.append(
            _decide(f"accuracy drop on {task.name}", task.drop_interval(confidence),
                    budgets.max_accuracy_drop, _points,
                    task.more_questions(budgets.max_accuracy_drop, confidence))
        )  # fmt: skip
    if not parts:
        return Decision("pass", "no budget on loss, KL or accuracy")
    for verdict in ("fail", "undecided"):
        found = [part for part in parts if part.verdict == verdict]
        if found:
            known = [part.more_sequences for part in found]
            numbers = [number for number in known if number is not None]
            more = max(numbers) if numbers and len(numbers) == len(known) else None
            return Decision(found[0].verdict, "; ".join(part.reason for part in found), more)
    return Decision("pass", "; ".join(part.reason for part in parts))


def _loss(value: float) -> str:
    return f"{math.expm1(min(value, 700.0)):.2%}"


def _plain(value: float) -> str:
    return f"{value:.4f}"


def _points(value: float) -> str:
    return f"{100 * value:.2f}pp"


def _decide(
    name: str,
    interval: Interval,
    limit: float,
    printed: Callable[[float], str],
    more: int | None,
) -> Decision:
    """Decide one budget on a mean of independent values, of which ``more`` would decide surely."""

    def show(value: float) -> str:
        return printed(value) if math.isfinite(value) else "unbounded"

    span = f"{name} {show(interval.value)} ({show(interval.low)} to {show(interval.high)})"
    if interval.high <= limit:
        return Decision("pass", f"{span} meets {show(limit)}")
    if interval.low > limit:
        return Decision("fail", f"{span} exceeds {show(limit)}")
    unit = ("question" if printed is _points else "sequence") + ("" if more == 1 else "s")
    needs = f": needs about {more} more {unit}" if more is not None else ""
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
