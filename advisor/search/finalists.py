"""Finalists: candidates that were really quantized and measured, and the choice among them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from advisor.evaluation.intervals import CONFIDENCE, guarded_interval, mean_interval

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from advisor.evaluation.gate import Decision
    from advisor.evaluation.measure import Measurement
    from advisor.evaluation.tasks import TaskMeasurement
    from advisor.search.goal import Goal
    from advisor.search.mixture import Mixture

_MOST_LOG_LOSS = 700.0
"""Beyond it a loss is no float."""
_WORTH_SAVING = 0.005
"""Share of the bytes below which a tie is not broken by size: all fill the same budget."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate and what was measured of it.

    Attributes:
        mixture: The candidate.
        measurement: Per-sequence results.
        decision: Whether it meets the quality budgets.
        slices: Per-sequence results on further texts, by name.
        task: Scores on the benchmark of an accuracy budget.
        looks: How often its text was made longer until it decides, the first time included.
        confidence: Of the intervals that decided: the more candidates there are, the wider.
        planned: Where the measurement was ended early, the sequences that it was to take; the
            candidate is never the answer then.
    """

    mixture: Mixture
    measurement: Measurement
    decision: Decision
    slices: Mapping[str, Measurement] = field(default_factory=dict)
    task: TaskMeasurement | None = None
    looks: int = 1
    confidence: float = CONFIDENCE
    planned: int | None = None

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.mixture.name

    @property
    def in_full(self) -> bool:
        """Whether the measurement was not ended early."""
        return self.planned is None

    @property
    def measured_kl(self) -> float:
        """Mean KL, nats per token."""
        return float(self.measurement.sequence_kl.mean())

    @property
    def loss_high(self) -> float:
        """Upper end, as it decides, of the loss on the text where it is highest."""
        highs = [
            self._high(text, text.sequence_nll - text.sequence_reference_nll)
            for text in self._texts
        ]
        return math.expm1(min(max(highs), _MOST_LOG_LOSS))

    @property
    def kl_high(self) -> float:
        """Upper end, as it decides, of the KL on the text where it is highest."""
        return max(self._high(text, text.sequence_kl) for text in self._texts)

    @property
    def accuracy_drop_high(self) -> float | None:
        """Upper end, as it decides, of the drop on the benchmark; None where there is none."""
        return None if self.task is None else self.task.drop_interval(self.confidence).high

    @property
    def _texts(self) -> tuple[Measurement, ...]:
        return (self.measurement, *self.slices.values())

    def _high(self, text: Measurement, values: NDArray[np.float64]) -> float:
        """Return an upper end; where it ended early, about that of the full length."""
        interval = guarded_interval(values, self.confidence)
        if self.planned is None or text.sequences >= self.planned:
            return interval.high
        share = float(np.sqrt(text.sequences / self.planned))
        return interval.value + share * (interval.high - interval.value)

    @property
    def passes(self) -> bool:
        """Whether the upper confidence bounds meet the quality budgets, measured in full."""
        return self.in_full and self.decision.verdict == "pass"


def strain(finalist: Finalist, goal: Goal) -> float:
    """Return by how much the upper confidence bounds use up the quality budgets; 1 is all."""
    parts = [0.0]
    if goal.max_loss is not None:
        high = np.log1p(max(finalist.loss_high, -0.5))
        parts.append(float(high) / max(float(np.log1p(goal.max_loss)), 1e-9))
    if goal.max_kl is not None:
        parts.append(finalist.kl_high / max(goal.max_kl, 1e-9))
    if goal.max_accuracy_drop is not None and finalist.accuracy_drop_high is not None:
        parts.append(finalist.accuracy_drop_high / max(goal.max_accuracy_drop, 1e-9))
    return max(parts)


def is_tie(a: Finalist, b: Finalist) -> bool:
    """Whether the paired difference of two candidates' KL may be zero (95%)."""
    count = min(a.measurement.sequences, b.measurement.sequences)
    difference = a.measurement.sequence_kl[:count] - b.measurement.sequence_kl[:count]
    if not np.any(difference):
        return True
    interval = mean_interval(difference)
    return interval.low <= 0 <= interval.high


def choose(finalists: Sequence[Finalist], goal: Goal) -> Finalist:
    """Return the answer among measured candidates.

    Of those within the size and quality budgets: the smallest where that is the goal; otherwise
    the one of least measured KL, or one that cannot be told from it and is really smaller. A
    tie never goes to a candidate that measured worse than the best uniform one. Where none is
    within, the nearest: least excess over the budgets. Candidates whose measurement was
    ended early are left out.

    Args:
        finalists: At least one that was measured in full.
        goal: The budgets.
    """
    within = [f for f in finalists if f.passes and excess_bytes(f.mixture, goal) == 0]
    if not within:
        return nearest([f for f in finalists if f.in_full], goal)
    count = min(f.measurement.sequences for f in within)

    def kl(finalist: Finalist) -> float:
        """Over the sequences that all of them were measured on."""
        return float(finalist.measurement.sequence_kl[:count].mean())

    if goal.smallest:
        return min(within, key=lambda f: (f.mixture.size_bytes, kl(f)))
    best = min(within, key=kl)
    ceiling = min((kl(f) for f in within if f.mixture.is_uniform), default=float("inf"))
    ties = [f for f in within if is_tie(f, best) and kl(f) <= ceiling]
    smallest = min(ties, key=lambda f: (f.mixture.size_bytes, kl(f)))
    saved = best.mixture.size_bytes - smallest.mixture.size_bytes
    return smallest if saved > _WORTH_SAVING * best.mixture.size_bytes else best


def nearest(finalists: Sequence[Finalist], goal: Goal) -> Finalist:
    """Return the candidate of least excess over the budgets."""
    return min(finalists, key=lambda f: (_distance(f, goal), f.mixture.size_bytes))


def excess_bytes(mixture: Mixture, goal: Goal) -> int:
    """Return by how many bytes a candidate is too large; too slow a one by so large a share."""
    if goal.pace is not None and not goal.pace.keeps(mixture.assignment):
        late = goal.pace.of(mixture.assignment) / goal.pace.limit - 1
        return max(1, int(late * mixture.size_bytes))
    return 0 if goal.max_bytes is None else max(0, mixture.size_bytes - goal.max_bytes)


def _distance(finalist: Finalist, goal: Goal) -> float:
    """Return how far a candidate is from the budgets, in doublings of size and loss."""
    over = excess_bytes(finalist.mixture, goal)
    size = 0.0 if goal.max_bytes is None else np.log2(1 + over / goal.max_bytes)
    return float(size) * 4 + float(np.log2(max(1.0, strain(finalist, goal))))


@dataclass(frozen=True, slots=True)
class ScoreQuality:
    """How well scores predict what is measured.

    Attributes:
        spearman: Rank correlation of predicted and measured KL; None for fewer than three.
        ratio: Geometric mean of measured over predicted KL; None for no finalists.
    """

    spearman: float | None
    ratio: float | None


def score_quality(finalists: Sequence[Finalist]) -> ScoreQuality:
    """Compare predicted and measured KL; scores do not predict what sequential codes gain."""
    usable = [
        f
        for f in finalists
        if f.mixture.predicted_kl > 0 and f.measured_kl > 0 and not f.mixture.family.sequential
    ]
    if not usable:
        return ScoreQuality(None, None)
    predicted = np.array([f.mixture.predicted_kl for f in usable])
    measured = np.array([f.measured_kl for f in usable])
    ratio = float(np.exp(np.mean(np.log(measured / predicted))))
    if len(usable) < 3:
        return ScoreQuality(None, ratio)
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (predicted, measured)]
    return ScoreQuality(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), ratio)
