"""Measure candidates on text that calibration never saw; every result is kept on disk."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from advisor.budgets import Budgets
from advisor.evaluation.gate import decide, look_confidence
from advisor.evaluation.measure import Measurement, measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.evaluation.tasks import TaskMeasurement
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json
from advisor.search.finalists import Finalist
from advisor.search.realise import realise

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from advisor.calibration.store import StatisticsStore
    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.tasks import Benchmark
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.search.compose import Mixture
    from advisor.search.goal import Goal

_VERSION = 1
_ARRAYS = ("sequence_kl", "sequence_nll", "sequence_reference_nll", "sequence_agreement")
_SCORES = "scores"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judges:
    """What candidates are judged on.

    Attributes:
        evaluation: All sequences that may be measured.
        first: How many of them are measured at once; the rest where that does not decide.
        slices: Further texts, by name, each of which must meet the quality budgets on its own.
        benchmark: The task of an accuracy budget.
    """

    evaluation: TokenSequences
    first: int
    slices: Mapping[str, TokenSequences] = field(default_factory=dict)
    benchmark: Benchmark | None = None

    @property
    def texts(self) -> dict[str, TokenSequences]:
        """Every text by name; the main one has none."""
        return {"": self.evaluation, **self.slices}

    @property
    def looks(self) -> int:
        """How often a measurement may be looked at: its text doubles from one to the next."""
        longest = max(text.sequences for text in self.texts.values())
        return len(_ends(self.first, longest))

    def part(self, text: TokenSequences, look: int) -> TokenSequences | None:
        """Return the sequences that a look adds; None where the text has ended before."""
        ends = [0, *_ends(self.first, text.sequences)]
        return text.part(ends[look - 1], ends[look]) if look < len(ends) else None


def _ends(first: int, available: int) -> list[int]:
    """Return how many sequences are measured after each look: n, 2n, 4n, ... and all."""
    found = [min(first, available)]
    while found[-1] < available:
        found.append(min(2 * found[-1], available))
    return found


class Measurer:
    """Quantizes and measures candidates; no measurement is made twice."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: StatisticsStore,
        judges: Judges,
        settings: QuantizationSettings,
        goal: Goal,
        folder: Path,
        cache: Path,
        calibration: TokenSequences | None = None,
    ) -> None:
        """Prepare.

        Args:
            loaded: The 16-bit model.
            store: Its statistics.
            judges: Held-out texts and benchmark.
            settings: The methods' settings that families refine.
            goal: Holds the quality budgets.
            folder: Where measurements are kept.
            cache: Where the unquantized model's predictions are kept.
            calibration: Sequences of the statistics, for sequential candidates.
        """
        self._loaded = loaded
        self._store = store
        self.judges = judges
        self._settings = settings
        self._budgets = Budgets(
            max_loss=goal.max_loss, max_kl=goal.max_kl,
            max_accuracy_drop=goal.max_accuracy_drop, task=goal.task,
        )  # fmt: skip
        self._folder = folder
        self._cache = cache
        self._calibration = calibration
        self.finalists: list[Finalist] = []

    def prepare(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Compute what the unquantized model says of the first sequences, and of the benchmark."""
        for text in self.judges.texts.values():
            part = self.judges.part(text, 1)
            if part is not None:
                Reference.compute(self._loaded, part, self._cache, progress)
        if self.judges.benchmark is not None:
            self._reference_scores(self.judges.benchmark, progress)

    def measure(
        self, mixture: Mixture, progress: Callable[[int, int], None] | None = None
    ) -> Finalist:
        """Return a candidate's measurement, from disk if it was made before."""
        known = next((f for f in self.finalists if f.mixture == mixture), None)
        if known is not None:
            return known
        found, task = self._look(mixture, 1, progress)
        finalist = self._finalist(mixture, found, task, 1)
        if all(_codes(mixture) != _codes(other.mixture) for other in self.finalists):
            self.finalists.append(finalist)
        return finalist

    def left(self, finalist: Finalist) -> int:
        """Return how many sequences of the main text a finalist was not measured on yet."""
        return self.judges.evaluation.sequences - finalist.measurement.sequences

    def can_grow(self, finalist: Finalist) -> bool:
        """Whether any text has sequences left for a finalist."""
        return finalist.looks < self.judges.looks

    def extend(
        self, finalist: Finalist, progress: Callable[[int, int], None] | None = None
    ) -> Finalist:
        """Return a finalist that was also measured on the next part of the texts."""
        look = finalist.looks + 1
        found, _ = self._look(finalist.mixture, look, progress)
        texts = {"": finalist.measurement, **finalist.slices}
        joined = {
            name: known.then(found[name]) if name in found else known
            for name, known in texts.items()
        }
        grown = self._finalist(finalist.mixture, joined, finalist.task, look)
        self.finalists[self.finalists.index(finalist)] = grown
        return grown

    def _finalist(
        self,
        mixture: Mixture,
        found: Mapping[str, Measurement],
        task: TaskMeasurement | None,
        look: int,
    ) -> Finalist:
        slices = {name: measured for name, measured in found.items() if name}
        decision = decide(
            found[""], self._budgets, slices=slices, task=task,
            confidence=look_confidence(look, self.judges.looks),
        )  # fmt: skip
        return Finalist(mixture, found[""], decision, slices, task, look)

    def _look(
        self, mixture: Mixture, look: int, progress: Callable[[int, int], None] | None
    ) -> tuple[dict[str, Measurement], TaskMeasurement | None]:
        """Measure what a look adds, quantizing only if something is not on disk."""
        references: dict[str, Reference] = {}
        for name, text in self.judges.texts.items():
            part = self.judges.part(text, look)
            if part is not None:
                references[name] = Reference.compute(self._loaded, part, self._cache)
        found = {
            name: stored
            for name, reference in references.items()
            if (stored := _read(self._path(mixture, reference.sequences.sha256))) is not None
        }
        benchmark = self.judges.benchmark if look == 1 else None
        scores = None if benchmark is None else self._read_scores(mixture, benchmark)
        missing = {name: row for name, row in references.items() if name not in found}
        if missing or (benchmark is not None and scores is None):
            family = mixture.family
            realised = realise(
                self._loaded, mixture.assignment, family.settings(self._settings), self._store,
                samples=family.samples, calibration=self._calibration, spill=self._folder,
            )  # fmt: skip
            with quantized_model(self._loaded.model, realised.weights, realised.replaced) as model:
                for name, reference in missing.items():
                    found[name] = measure(model, reference, progress=progress)
                    self._keep(mixture, reference.sequences.sha256, _document(found[name]))
                if benchmark is not None and scores is None:
                    scores = self._score(mixture, benchmark, model, progress)
        if benchmark is None or scores is None:
            return found, None
        reference_scores = self._reference_scores(benchmark, None)
        return found, TaskMeasurement(benchmark.name, scores, reference_scores)

    def _path(self, mixture: Mixture, evaluation: str) -> Path:
        key = sha256_json(
            {
                "version": _VERSION,
                "candidate": mixture.identity(self._settings),
                "statistics": self._store.key,
                "evaluation": evaluation,
            }
        )
        return self._folder / f"{key}.json"

    def _keep(self, mixture: Mixture, evaluation: str, document: dict[str, object]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        named = {"name": mixture.name, "size_bytes": mixture.size_bytes} | document
        write_atomically(self._path(mixture, evaluation), json.dumps(named))

    def _score(
        self,
        mixture: Mixture,
        benchmark: Benchmark,
        model: nn.Module,
        progress: Callable[[int, int], None] | None,
    ) -> NDArray[np.float64]:
        scores = benchmark.evaluate(model, progress)
        self._keep(mixture, benchmark.identity, {_SCORES: scores.tolist()})
        return scores

    def _read_scores(self, mixture: Mixture, benchmark: Benchmark) -> NDArray[np.float64] | None:
        return _read_array(self._path(mixture, benchmark.identity))

    def _reference_scores(
        self, benchmark: Benchmark, progress: Callable[[int, int], None] | None
    ) -> NDArray[np.float64]:
        """Return the unquantized model's scores, from disk if they were made before."""
        key = sha256_json([_VERSION, self._loaded.fingerprint, str(self._loaded.dtype),
                           benchmark.identity])  # fmt: skip
        path = self._cache / "references" / f"{key[:32]}.json"
        scores = _read_array(path)
        if scores is None:
            scores = benchmark.evaluate(self._loaded.model, progress)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps({_SCORES: scores.tolist()}))
        return scores


def _codes(mixture: Mixture) -> tuple[object, ...]:
    """Return what tells a finalist from another; one of each is enough."""
    return mixture.assignment, mixture.family.sequential


def _document(found: Measurement) -> dict[str, object]:
    return {name: getattr(found, name).tolist() for name in _ARRAYS}


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


def _read_array(path: Path) -> NDArray[np.float64] | None:
    """Return stored scores, or None where there are none to be trusted."""
    if not path.is_file():
        return None
    try:
        return np.array(json.loads(path.read_text(encoding="utf-8"))[_SCORES], np.float64)
    except (ValueError, KeyError, TypeError):
        _logger.warning("scores %s are damaged and will be made again", path)
        return None
