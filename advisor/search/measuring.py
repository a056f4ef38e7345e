"""Measure candidates on text that calibration never saw; every result is kept on disk.

A candidate's codes lie on disk while it is measured; memory holds those of one block.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from advisor.budgets import Budgets
from advisor.evaluation.gate import Decision, decide, holm, look_confidence
from advisor.evaluation.measure import Measurement, measure
from advisor.evaluation.reference import Reference, reference_bytes
from advisor.evaluation.runtime import quantized_model
from advisor.evaluation.tasks import TaskMeasurement
from advisor.plan.hashing import sha256_json
from advisor.search.codes import CodePool
from advisor.search.finalists import Finalist, excess_bytes
from advisor.search.on_demand import OnDemand
from advisor.search.pruning import Watch
from advisor.search.realise import Realised, realise
from advisor.search.records import Records, read_scores, write_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.tasks import Benchmark
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.search.goal import Goal
    from advisor.search.judges import Judges
    from advisor.search.mixture import Mixture
    from advisor.search.outside import Outside

_VERSION = 1


class Measurer:
    """Quantizes and measures candidates; no measurement is made twice."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: Statistics,
        judges: Judges,
        settings: QuantizationSettings,
        goal: Goal,
        folder: Path,
        cache: Path,
        calibration: TokenSequences | None = None,
        reference_limit: int | None = None,
        kept_bytes: int = 0,
        *,
        uniform_in_full: bool = True,
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
            reference_limit: Bytes that the unquantized model's predictions may take on disk; text
                beyond that is not measured.
            kept_bytes: That codes of earlier candidates may take on disk, to be used again.
            uniform_in_full: See :class:`advisor.search.pruning.Watch`.
        """
        self._loaded = loaded
        self._store = store
        self.judges = judges
        self._settings = settings
        self._budgets = Budgets(
            max_loss=goal.max_loss, max_kl=goal.max_kl,
            max_accuracy_drop=goal.max_accuracy_drop, task=goal.task,
        )  # fmt: skip
        self._goal = goal
        self._records = Records(folder, settings, store.key)
        self._pool = CodePool(folder, kept_bytes)
        self._cache = cache
        self._calibration = calibration
        self._reference_limit = reference_limit
        self._whole = uniform_in_full
        self.finalists: list[Finalist] = []
        self._outside: dict[str, Outside] = {}

    def adopt(self, outside: Outside) -> None:
        """Take up a candidate of another library, so that it can be measured."""
        self._outside[outside.mixture.identity(self._settings)] = outside

    def _realise(self, mixture: Mixture) -> Realised:
        """Return a candidate's weights: quantized here, or read from another library's files."""
        outside = self._outside.get(mixture.identity(self._settings))
        if outside is not None:
            return outside.load()
        return realise(
            self._loaded, mixture.assignment, mixture.family.settings(self._settings), self._store,
            samples=mixture.family.samples, calibration=self._calibration,
            pool=self._pool,
        )  # fmt: skip

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
        watch = Watch(mixture, self.finalists, self._goal, uniform_in_full=self._whole)
        found, task = self._look(mixture, 1, progress, watch)
        finalist = self._finalist(mixture, found, task, 1)
        if (ended := watch.ended) is not None:
            finalist = replace(
                finalist, planned=ended.planned, decision=Decision("stopped", ended.reason)
            )
        if any(_codes(mixture) == _codes(other.mixture) for other in self.finalists):
            return finalist
        self.finalists.append(finalist)
        return self._decide_all(len(self.finalists) - 1)

    def complete(
        self, finalist: Finalist, progress: Callable[[int, int], None] | None = None
    ) -> Finalist:
        """Return a finalist whose measurement was ended early, now measured in full."""
        found, task = self._look(finalist.mixture, 1, progress)
        whole = self._finalist(finalist.mixture, found, task, 1)
        place = self.finalists.index(finalist)
        self.finalists[place] = whole
        return self._decide_all(place)

    def left(self, finalist: Finalist) -> int:
        """Return how many sequences of the main text a finalist was not measured on yet."""
        return self.judges.evaluation.sequences - finalist.measurement.sequences

    def can_grow(self, finalist: Finalist) -> bool:
        """Whether any text has sequences left for one measured in full, and the disk room."""
        if not finalist.in_full or finalist.looks >= self.judges.looks:
            return False
        if self._reference_limit is None:
            return True
        config: Any = self._loaded.model.config
        parts = [
            self.judges.part(text, look)
            for look in range(1, finalist.looks + 2)
            for text in self.judges.texts.values()
        ]
        vocabulary = int(config.vocab_size)
        needed = sum(reference_bytes(part, vocabulary) for part in parts if part is not None)
        return needed <= self._reference_limit

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
        place = self.finalists.index(finalist)
        self.finalists[place] = grown
        return self._decide_all(place)

    def _decide_all(self, place: int) -> Finalist:
        """Decide all candidates that may be the answer, as so many as they are; return one.

        Candidates over the size budget, or whose measurement ended early, are no answers.
        """
        gated = [
            index
            for index, f in enumerate(self.finalists)
            if f.in_full and not excess_bytes(f.mixture, self._goal)
        ]
        shares = holm([partial(self._passes, self.finalists[index]) for index in gated])
        for index, share in zip(gated, shares, strict=True):
            self.finalists[index] = self._decided(self.finalists[index], share)
        return self.finalists[place]

    def _passes(self, finalist: Finalist, share: float) -> bool:
        return self._decided(finalist, share).passes

    def _decided(self, finalist: Finalist, share: float) -> Finalist:
        """Return a finalist decided at a share of the error."""
        looked = look_confidence(finalist.looks, self.judges.looks)
        confidence = 1.0 - (1.0 - looked) * share
        decision = decide(
            finalist.measurement, self._budgets, slices=finalist.slices, task=finalist.task,
            confidence=confidence,
        )  # fmt: skip
        return replace(finalist, decision=decision, confidence=confidence)

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
        self,
        mixture: Mixture,
        look: int,
        progress: Callable[[int, int], None] | None,
        watch: Watch | None = None,
    ) -> tuple[dict[str, Measurement], TaskMeasurement | None]:
        """Measure what a look adds, quantizing only if something is not on disk.

        Where the watch ends the measurement of a text, nothing after it is measured.
        """
        found: dict[str, Measurement] = {}
        benchmark = self.judges.benchmark if look == 1 else None
        scores: NDArray[np.float64] | None = None
        with OnDemand(lambda: self._quantized(mixture)) as model:
            for name, text in self.judges.texts.items():
                if (part := self.judges.part(text, look)) is None:
                    continue
                stop = None if watch is None else watch.of_text(name, part.sequences)
                found[name] = self._measured(mixture, part, model, progress, stop)
                if watch is not None and watch.ended is not None:
                    return found, None
            if benchmark is not None:
                scores = self._records.scores(mixture, benchmark.identity)
                if scores is None:
                    scores = benchmark.evaluate(model(), progress)
                    self._records.keep_scores(mixture, benchmark.identity, scores)
        if benchmark is None or scores is None:
            return found, None
        reference_scores = self._reference_scores(benchmark, None)
        return found, TaskMeasurement(benchmark.name, scores, reference_scores)

    def _measured(
        self,
        mixture: Mixture,
        text: TokenSequences,
        model: Callable[[], nn.Module],
        progress: Callable[[int, int], None] | None,
        stop: Callable[[Measurement], bool] | None,
    ) -> Measurement:
        """Return what is known of a candidate on a text, measuring what is not."""
        known = self._records.measurement(mixture, text.sha256)
        seen = 0 if known is None else known.sequences
        if known is not None:
            ended = stop is not None and any(stop(known.first(n + 1)) for n in range(seen))
            if ended or seen == text.sequences:
                return known
        reference = Reference.compute(self._loaded, text, self._cache)
        found = measure(model(), reference, progress=progress, stop=stop, known=known)
        self._records.keep(mixture, text.sha256, found)
        return found

    def _quantized(self, mixture: Mixture) -> AbstractContextManager[nn.Module]:
        """Return the model with a candidate's codes, for a while."""
        realised = self._realise(mixture)
        return quantized_model(self._loaded.model, realised.weights, realised.replaced)

    def _reference_scores(
        self, benchmark: Benchmark, progress: Callable[[int, int], None] | None
    ) -> NDArray[np.float64]:
        """Return the unquantized model's scores, from disk if they were made before."""
        key = sha256_json([_VERSION, self._loaded.fingerprint, str(self._loaded.dtype),
                           benchmark.identity])  # fmt: skip
        path = self._cache / "references" / f"{key[:32]}.json"
        scores = read_scores(path)
        if scores is None:
            scores = benchmark.evaluate(self._loaded.model, progress)
            write_scores(path, scores)
        return scores


def _codes(mixture: Mixture) -> tuple[object, ...]:
    """Return what tells a finalist from another; one of each is enough."""
    return mixture.assignment, mixture.family.sequential, mixture.backend
