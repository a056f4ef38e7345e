"""Finalists: candidates that are really quantized and measured on text calibration never saw."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advisor.budgets import Budgets
from advisor.evaluation.gate import Decision, decide
from advisor.evaluation.intervals import mean_interval
from advisor.evaluation.measure import Measurement, measure
from advisor.evaluation.runtime import quantized_model
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json
from advisor.search.realise import realise

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from advisor.calibration.store import StatisticsStore
    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.reference import Reference
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.search.compose import Mixture
    from advisor.search.goal import Goal

_VERSION = 1
_ARRAYS = ("sequence_kl", "sequence_nll", "sequence_reference_nll", "sequence_agreement")
_WORTH_SAVING = 0.005
"""Share of the bytes below which a tie is not broken by size: all fill the same budget."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finalist:
    """A candidate and what was measured of it.

    Attributes:
        mixture: The candidate.
        measurement: Per-sequence results.
        decision: Whether it meets the quality budgets.
    """

    mixture: Mixture
    measurement: Measurement
    decision: Decision

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.mixture.name

    @property
    def measured_kl(self) -> float:
        """Mean KL, nats per token."""
        return float(self.measurement.sequence_kl.mean())

    @property
    def passes(self) -> bool:
        """Whether the upper confidence bounds meet the quality budgets."""
        return self.decision.verdict == "pass"


class Measurer:
    """Quantizes and measures candidates; every result is on disk at once and never redone."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: StatisticsStore,
        reference: Reference,
        settings: QuantizationSettings,
        goal: Goal,
        folder: Path,
        calibration: TokenSequences | None = None,
    ) -> None:
        """Prepare.

        Args:
            loaded: The 16-bit model.
            store: Its statistics.
            reference: What it says of the evaluation text.
            settings: The methods' settings that families refine.
            goal: Holds the quality budgets.
            folder: Where measurements are kept.
            calibration: Sequences of the statistics, for sequential candidates.
        """
        self._loaded = loaded
        self._store = store
        self._reference = reference
        self._settings = settings
        self._budgets = Budgets(max_loss=goal.max_loss, max_kl=goal.max_kl)
        self._folder = folder
        self._calibration = calibration
        self.finalists: list[Finalist] = []

    def measure(
        self, mixture: Mixture, progress: Callable[[int, int], None] | None = None
    ) -> Finalist:
        """Return a candidate's measurement, from disk if it was made before."""
        key = sha256_json(
            {
                "version": _VERSION,
                "candidate": mixture.identity(self._settings),
                "statistics": self._store.key,
                "evaluation": self._reference.sequences.sha256,
            }
        )
        path = self._folder / f"{key}.json"
        found = _read(path)
        if found is None:
            found = self._measure(mixture, progress)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(_document(mixture, found)))
        finalist = Finalist(mixture, found, decide(found, self._budgets))
        if all(_codes(mixture) != _codes(other.mixture) for other in self.finalists):
            self.finalists.append(finalist)
        return finalist

    def _measure(
        self, mixture: Mixture, progress: Callable[[int, int], None] | None
    ) -> Measurement:
        family = mixture.family
        total = self._reference.count
        realised = realise(
            self._loaded,
            mixture.assignment,
            family.settings(self._settings),
            self._store,
            samples=family.samples,
            calibration=self._calibration,
        )
        if progress is not None:
            progress(0, total)
        with quantized_model(self._loaded.model, realised.weights, realised.replaced) as model:
            return measure(model, self._reference, progress=progress)


def _codes(mixture: Mixture) -> tuple[object, ...]:
    """Return what tells a finalist from another; one of each is enough."""
    return mixture.assignment, mixture.family.sequential


def _document(mixture: Mixture, found: Measurement) -> dict[str, object]:
    return {"name": mixture.name, "size_bytes": mixture.size_bytes} | {
        name: getattr(found, name).tolist() for name in _ARRAYS
    }


def _read(path: Path) -> Measurement | None:
    """Return a stored measurement, or None where there is none to be trusted."""
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return Measurement(**{name: np.array(document[name], np.float64) for name in _ARRAYS})
    except (ValueError, KeyError, TypeError):
        _logger.warning("measurement %s is damaged and will be made again", path)
        return None


def strain(finalist: Finalist, goal: Goal) -> float:
    """Return by how much the upper confidence bounds use up the quality budgets; 1 is all."""
    parts = [0.0]
    if goal.max_loss is not None:
        high = np.log1p(max(finalist.measurement.loss.high, -0.5))
        parts.append(float(high) / max(float(np.log1p(goal.max_loss)), 1e-9))
    if goal.max_kl is not None:
        parts.append(finalist.measurement.kl.high / max(goal.max_kl, 1e-9))
    return max(parts)


def is_tie(a: Finalist, b: Finalist) -> bool:
    """Whether the paired difference of two candidates' KL may be zero (95%)."""
    difference = a.measurement.sequence_kl - b.measurement.sequence_kl
    if not np.any(difference):
        return True
    interval = mean_interval(difference)
    return interval.low <= 0 <= interval.high


def choose(finalists: Sequence[Finalist], goal: Goal) -> Finalist:
    """Return the answer among measured candidates.

    Of those within the size and quality budgets: the smallest where that is the goal; otherwise
    the one of least measured KL, or one that cannot be told from it and is really smaller. A
    tie never goes to a candidate that measured worse than the best uniform one. Where none is
    within, the nearest: least excess over the budgets.

    Args:
        finalists: At least one.
        goal: The budgets.
    """
    within = [f for f in finalists if f.passes and excess_bytes(f.mixture, goal) == 0]
    if not within:
        return min(finalists, key=lambda f: (_distance(f, goal), f.mixture.size_bytes))
    if goal.smallest:
        return min(within, key=lambda f: (f.mixture.size_bytes, f.measured_kl))
    best = min(within, key=lambda f: f.measured_kl)
    uniform = [f.measured_kl for f in within if f.mixture.is_uniform]
    ceiling = min(uniform, default=float("inf"))
    ties = [f for f in within if is_tie(f, best) and f.measured_kl <= ceiling]
    smallest = min(ties, key=lambda f: (f.mixture.size_bytes, f.measured_kl))
    saved = best.mixture.size_bytes - smallest.mixture.size_bytes
    return smallest if saved > _WORTH_SAVING * best.mixture.size_bytes else best


def excess_bytes(mixture: Mixture, goal: Goal) -> int:
    """Return by how many bytes a candidate is too large."""
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
