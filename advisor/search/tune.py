"""Tune: statistics once, cheap trials, a handful of measured finalists, a plan."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.calibration.tokens import check_disjoint
from advisor.engines.outer import outer_problems, with_ends
from advisor.errors import InputError, join_errors
from advisor.formats.gguf_write import gguf_problems
from advisor.formats.layouts import engine_problems
from advisor.formats.stored import open_stored
from advisor.models.config_file import read_config
from advisor.modelspec.outer import outer_modules
from advisor.search.clock import Clock
from advisor.search.effort import FULL, Effort
from advisor.search.judges import Judges
from advisor.search.planning import Task
from advisor.search.results import SearchEvent, TuneResult
from advisor.search.run import Run
from advisor.search.sole_options import search_options
from advisor.search.study import check_sampler

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from advisor.budgets import Budgets
    from advisor.calibration.tokens import TokenSequences
    from advisor.engines.options import MixtureOptions
    from advisor.hardware.profile import HardwareProfile
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import ModelSpec
    from advisor.search.outside import Outsiders

__all__ = ["SearchEvent", "TuneResult", "tune"]


def tune(
    loaded: LoadedModel,
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    *,
    calibration: TokenSequences,
    evaluation: TokenSequences | Judges,
    workdir: Path,
    trials: int = 40,
    time_budget_s: float | None = None,
    seed: int = 0,
    storage: str | None = None,
    study_name: str | None = None,
    context: int = 4096,
    batch: int = 1,
    prefer: str = "balanced",
    options: MixtureOptions | None = None,
    settings: QuantizationSettings | None = None,
    sequential: bool = True,
    sampler: str = "tpe",
    effort: Effort = FULL,
    outsiders: Outsiders | None = None,
    max_disk_bytes: int | None = None,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    progress: Callable[[SearchEvent], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> TuneResult:
    """Find the quantization that meets the budgets best, and measure it.

    The same call goes on where a killed one stopped: statistics, scores, finished trials and
    measurements are kept. Ctrl-C (KeyboardInterrupt) ends the search with the best so far, if
    anything was measured.

    Args:
        loaded: The 16-bit model.
        spec: Its tensors.
        hardware: What will serve it.
        engine: Engine's name.
        budgets: Limits; without any, at most 1% loss is aimed at.
        calibration: Sequences that codes are fitted to.
        evaluation: Sequences that finalists are judged on, or these with further texts and tasks.
        workdir: Folder of the study and the measurements.
        trials: Finished trials wanted, those of earlier runs included.
        time_budget_s: Seconds after which no further trial or measurement starts.
        seed: Of the sampler.
        storage: Study's database: a file or an RDB URL; by default in ``workdir``.
        study_name: By default made of all that the trials depend on.
        context: Tokens of a sequence when serving.
        batch: Sequences at once when serving.
        prefer: ``accuracy``, ``size``, ``speed`` or ``balanced``.
        options: What one checkpoint may mix; by default what the engine does on the hardware.
        settings: The methods' settings that the search refines; by default the effort's.
        sequential: Also measure the answer with each block fitted to the quantized ones before it.
        sampler: ``tpe``, ``nsga2`` (over the frontier of size and KL) or ``random``.
        effort: What the search spends.
        outsiders: Makes candidates of other libraries, small and fast enough.
        max_disk_bytes: The most that statistics, references and candidates may add to the disk.
        quantize_head: Let the head take fewer bits too.
        quantize_embedding: Let the embedding take fewer bits too.
        progress: Called with events.
        stop: Asked before every step; True ends the search as Ctrl-C does.

    Raises:
        InputError: The texts overlap, the engine offers nothing, the storage cannot be opened,
            an accuracy budget has no benchmark, the disk is too small, or the engine reads no
            quantized head or embedding of this model.
        KeyboardInterrupt: It was to stop before anything was measured.
    """
    if trials < 1:
        raise InputError(f"--trials must be at least 1, but got {trials}.")
    judges = evaluation
    if not isinstance(judges, Judges):
        judges = Judges(judges, judges.sequences)
    check_sampler(sampler)
    if budgets.max_accuracy_drop is not None and judges.benchmark is None:
        raise InputError("max_accuracy_drop needs the benchmark that it speaks of.")
    overlap = check_disjoint(calibration, judges.evaluation)
    for text in judges.slices.values():
        check_disjoint(calibration, text)
    offered = options or search_options(engine, hardware, spec, spec.linears)
    ends = outer_modules(spec, head=quantize_head, embedding=quantize_embedding)
    problems = engine_problems(spec.architecture, offered.format, engine)
    if offered.format == "gguf":  # refused when written, but that is after the whole search
        stored = open_stored(loaded.folder)
        problems += gguf_problems(loaded.folder, read_config(loaded.folder), list(stored.headers))
    if problems := problems + outer_problems(engine, offered.format, ends):
        raise InputError(join_errors(problems))
    offered, ends = with_ends(engine, hardware, offered, ends)
    offered = replace(offered, schemes=effort.options(offered.schemes))
    base = settings or effort.settings
    task = Task(
        loaded, spec, hardware, engine, budgets, calibration, judges,
        context, batch, offered.format, base,
    )  # fmt: skip
    clock = Clock(time_budget_s, stop or (lambda: False))
    report = progress or (lambda event: None)
    run = Run(
        task, offered, workdir, report, clock, overlap,
        sequential=sequential and effort.sequential, sampler=sampler, effort=effort,
        outsiders=outsiders, max_disk_bytes=max_disk_bytes, outer=ends,
    )  # fmt: skip
    return run.search(
        trials=trials, seed=seed, storage=storage, study_name=study_name, prefer=prefer
    )
