"""One search: its stages in order, each of which Ctrl-C or a time budget may end."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from advisor.calibration.representativeness import (
    Representativeness,
    kept_representativeness,
)
from advisor.calibration.settings import default_prefixes
from advisor.calibration.sources import collect
from advisor.formats.layouts import experts_as_one
from advisor.plan.folders import cache_root
from advisor.search.aim import aim, name_of_study
from advisor.search.closing import complete_nearest, fill_gap
from advisor.search.compose import Composer
from advisor.search.disk import DiskUse, check_disk, open_what_fits
from advisor.search.effort import FULL, Effort
from advisor.search.fallbacks import coverage_row, shape_fallbacks
from advisor.search.finalists import Finalist, choose, excess_bytes, score_quality
from advisor.search.input_noise import InputNoise
from advisor.search.measuring import Measurer
from advisor.search.memory import check_memory, predict_memory
from advisor.search.offers import uniform_offers
from advisor.search.outcomes import best_so_far
from advisor.search.outer import OuterBook
from advisor.search.outside import Wanted, measure_outsiders
from advisor.search.pace import in_time, is_fast
from advisor.search.planning import Task, build_plan
from advisor.search.refine import Refiner
from advisor.search.relaxing import Relaxation, relaxations
from advisor.search.results import SearchEvent, TuneResult
from advisor.search.scores import ScoreBook
from advisor.search.sifting import methods_far_behind, sample_of, without
from advisor.search.space import Space, parameters_of, priors, usual_families, with_whole_ranges
from advisor.search.study import check_storage, run_study
from advisor.search.trials import Scorer, families_to_measure, scoring_allowance
from advisor.search.workers import storage_url

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from advisor.calibration.mixing import Statistics
    from advisor.engines.options import MixtureOptions
    from advisor.modelspec.outer import OuterModule
    from advisor.search.clock import Clock
    from advisor.search.families import Family
    from advisor.search.goal import Goal
    from advisor.search.limits import SizeLimit
    from advisor.search.mixture import Mixture
    from advisor.search.outcomes import TrialRecord
    from advisor.search.outside import Outsiders

_TRIALS_SHARE = 0.5
"""Share of a time budget after which no more trials start."""
_NOTHING_MEASURED = (
    "interrupted before any candidate was measured, so no plan was written; the same command goes "
    "on where it stopped"
)
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """One search: its stages in order, each of which Ctrl-C may end."""

    task: Task
    offered: MixtureOptions
    workdir: Path
    report: Callable[[SearchEvent], None]
    clock: Clock
    overlap: float
    records: list[TrialRecord] = field(default_factory=list)
    finalists: list[Finalist] = field(default_factory=list)
    sequential: bool = True
    sampler: str = "tpe"
    effort: Effort = FULL
    passed_over: Mapping[str, str] = field(default_factory=dict)
    fit: Representativeness | None = None
    relaxed: tuple[Relaxation, ...] = ()
    limits: tuple[SizeLimit, ...] = ()
    study: str = "none"
    outsiders: Outsiders | None = None
    max_disk_bytes: int | None = None
    outer: tuple[OuterModule, ...] = ()

    def search(
        self, *, trials: int, seed: int, storage: str | None, study_name: str | None, prefer: str
    ) -> TuneResult:
        """Run all stages; see :func:`advisor.search.tune.tune`.

        Raises:
            KeyboardInterrupt: It was to stop before anything was measured.
        """
        task = self.task
        memory = predict_memory(task)
        check_memory(memory)
        self.report(SearchEvent("Memory", 1, 1, memory.describe()))
        theirs = 0
        if self.outsiders is not None:
            theirs = self.outsiders.predicted_bytes(task.budgets.max_size_bytes)
        store, disk = open_what_fits(task, self.max_disk_bytes, self.outer, theirs)
        check_disk(disk)
        self.report(SearchEvent("Disk", 1, 1, disk.describe()))
        self.workdir.mkdir(parents=True, exist_ok=True)
        url = storage_url(storage, self.workdir)
        check_storage(url)
        folder = cache_root() / "scores"
        noise = InputNoise(task.loaded, store, task.calibration, folder)
        book = ScoreBook(task.loaded, store, folder, noise)
        self.offered, pace = in_time(task, self.offered, prefer)
        composer = Composer(
            task.spec, task.loaded.linears, self.offered, book, task.settings,
            outer=self._outer_book(store, book), pace=pace,
            experts_as_one=experts_as_one(task.engine, self.offered.format),
        )  # fmt: skip
        self.limits, goal, space = aim(
            task, self.offered, composer, self.outer, prefer=prefer, pace=pace,
            prefixes=default_prefixes(task.calibration.sequences, compact=store.compact),
            methods=self.effort.methods,
        )  # fmt: skip
        try:
            collect(task.loaded, task.calibration, store, self._stage("Statistics"))
            self.fit = kept_representativeness(
                task.loaded, task.calibration, task.judges.evaluation.first(task.judges.first),
                cache_root(), self._stage("Comparing texts"),
                sequences=self.effort.compared_sequences,
            )  # fmt: skip
            scorer = self._scorer(composer, space, goal)
            self.study = study_name or name_of_study(
                task, self.offered, scorer.space, goal, store.key,
                seed=seed, sampler=self.sampler, outer=self.outer, effort=self.effort,
            )  # fmt: skip
            self._trials(scorer, url, trials, seed)
            self._measure(scorer, store, goal, disk)
        except KeyboardInterrupt:
            _logger.info("interrupted: keeping the best so far")
            self.clock.stopped = "interrupted"
        if not self.finalists:
            raise KeyboardInterrupt(_NOTHING_MEASURED)
        return self._result(goal, seed, store)

    def _outer_book(self, store: Statistics, book: ScoreBook) -> OuterBook | None:
        """Return the scores of embedding and head, where they are to be quantized."""
        if not self.outer:
            return None
        folder = cache_root() / "scores"
        return OuterBook(self.task.loaded, store, folder, self.outer, book.fitted_samples)

    def _scorer(self, composer: Composer, space: Space, goal: Goal) -> Scorer:
        """Return what scores trials, of the methods that a look at a few blocks leaves."""
        if not self.clock.over(_TRIALS_SHARE):
            step = self._stage("Scores: every method on a few blocks")
            self.passed_over = methods_far_behind(composer, usual_families(space), step)
        space, allowance = without(space, self.passed_over), 0
        if self.effort.explores:
            allowance = scoring_allowance(
                self.task.spec.quantizable_parameters,
                len(space.mixes) + len(space.rotations) - 2,
                tuple(self.passed_over),
            )
        usual = usual_families(space)
        if not sample_of(composer.linears):  # what a look would tell of a deep model
            usual += with_whole_ranges(usual)
        return Scorer(composer, space, goal, allowance, self._scoring, usual=usual)

    def _trials(self, scorer: Scorer, url: str, trials: int, seed: int) -> None:
        """Run the study."""
        space = scorer.space
        proposals = priors(space)
        queue = [parameters_of(proposal, space) for proposal in proposals]

        def keep(record: TrialRecord, finished: int) -> None:
            self.records.append(record)
            best = scorer.best
            note = "" if best is None else f"best {best.name}, KL {best.predicted_kl:.4f} predicted"
            self.report(SearchEvent("Trials", finished, trials, note))

        def run(count: int) -> list[TrialRecord]:
            return run_study(
                name=self.study, url=url, seed=seed, trials=count, propose_and_score=scorer,
                priors=queue, stop=lambda: self.clock.over(_TRIALS_SHARE), report=keep,
                sampler=self.sampler,
            )  # fmt: skip

        self.records = run(0)
        scorer.recall(self.records)
        if self.clock.over(_TRIALS_SHARE):
            return
        sure = proposals[len(self.records) : trials]
        scorer.expected = list(dict.fromkeys(proposal.family for proposal in sure))
        self.records = run(trials)

    def _measure(self, scorer: Scorer, store: Statistics, goal: Goal, disk: DiskUse) -> None:
        """Measure finalists; where none meets the budgets, also what would."""
        task = self.task
        measurer = Measurer(
            task.loaded, store, task.judges, task.settings, goal, self.workdir / "finalists",
            cache_root(), task.calibration, disk.left_for_references, disk.kept,
            uniform_in_full=self.effort.every_uniform,
        )  # fmt: skip
        self.finalists = measurer.finalists
        measurer.prepare(self._stage("Reference"))
        composer = scorer.composer
        smallest, largest = composer.smallest_and_largest()
        limit = max(goal.max_bytes or (smallest.total_bytes + largest.total_bytes) // 2,
                    smallest.total_bytes)  # fmt: skip
        expert = [proposal.family for proposal in priors(scorer.space)]
        usual = next((family for family in expert if family.method == "gptq"), expert[0])
        families = families_to_measure(scorer, self.records, usual, limit)
        refiner = Refiner(
            composer, measurer, goal, families, self._may_not_measure, self._measuring,
            every_uniform=self.effort.every_uniform,
        )  # fmt: skip
        fast = partial(is_fast, task, self.offered, goal.pace)
        offers = [
            offer
            for offer in uniform_offers(
                task.spec, task.loaded.linears, task.hardware, task.engine, self.offered, self.outer
            )
            if fast(offer.assignment, offer.format_name)
        ]
        refiner.run(offers)
        refiner.measure_offers(offers)
        refiner.settle()
        if self.sequential:
            refiner.refine_sequentially()
            refiner.settle()
        fill_gap(refiner)
        if self.outsiders is not None:
            measure_outsiders(
                self.outsiders, measurer, Wanted(goal.max_bytes, fast), self._may_not_measure,
                self._measuring,
            )  # fmt: skip
            refiner.settle()
        complete_nearest(refiner)
        if self.finalists and not self._meets(choose(self.finalists, goal), goal):
            self.relaxed = relaxations(refiner, task.budgets, self.limits)

    def _may_not_measure(self) -> bool:
        """Whether to stop; a time budget still leaves room for one mixture and one uniform."""
        over = self.clock.over()
        kinds = {f.mixture.is_uniform for f in self.finalists}
        return over and (self.clock.stopped == "interrupted" or len(kinds) == 2)

    def _meets(self, finalist: Finalist, goal: Goal) -> bool:
        return finalist.passes and excess_bytes(finalist.mixture, goal) == 0

    def _result(self, goal: Goal, seed: int, store: Statistics) -> TuneResult:
        task, answer = self.task, choose(self.finalists, goal)
        chosen, feasible = answer.mixture, self._meets(answer, goal)
        quality = score_quality(self.finalists)
        plan = build_plan(
            self.task, goal, answer, self.finalists, study=self.study, trials=len(self.records),
            seed=seed, stopped=self.clock.stopped, spearman=quality.spearman, overlap=self.overlap,
            fit=self.fit, sampler=self.sampler, effort=self.effort,
            passed_over=tuple(self.passed_over.values()),
            coverage=coverage_row(task.loaded, store, chosen.family.samples),
            fallbacks=shape_fallbacks(
                task.engine, task.hardware, task.loaded.linears, self.offered,
                chosen.assignment,
            ),
            best=best_so_far(self.records),
            compact=store.compact,
        )  # fmt: skip
        return TuneResult(
            plan=plan,
            finalists=tuple(self.finalists),
            trials=tuple(self.records),
            feasible=feasible,
            relaxation=() if feasible else self.relaxed,
            quality=quality,
            goal=goal,
            seconds=self.clock.seconds,
            answer=answer,
        )

    def _stage(self, name: str) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            self.report(SearchEvent(name, done, total))
            if self.clock.asked():
                raise KeyboardInterrupt

        return step

    def _scoring(self, family: Family, done: int, total: int) -> None:
        self._stage(f"Scores: {family.describe()}")(done, total)

    def _measuring(self, mixture: Mixture) -> Callable[[int, int], None]:
        number = len(self.finalists) + 1
        by = mixture.backend or mixture.family.method
        return self._stage(f"Finalist {number}: {mixture.name} ({by})")
