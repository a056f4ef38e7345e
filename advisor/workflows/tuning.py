"""``tune``: search, measure the finalists, write the plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.plan.files import save_plan
from advisor.workflows.checking import (
    BudgetsGiven,
    check_counts,
    check_lists,
    check_output,
    check_request,
    disk_bytes_of,
    seconds_of,
)
from advisor.workflows.computing import check_device_name, describe_device, device_for
from advisor.workflows.finalist_documents import finalist_document, in_order, why
from advisor.workflows.progress import ProgressCallback, ProgressEvent, ignore_progress
from advisor.workflows.resolve import check_model_name, resolve_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.search.tune import SearchEvent, TuneResult
    from advisor.workflows.backend_offers import BackendOffers


_SAMPLES, _SAMPLES_ON_ACCELERATOR = 32, 128
"""Calibration sequences by default. On SmolLM2-135M four times as many lowered KL by a sixth, and
take the statistics four times as long."""


@dataclass(frozen=True, slots=True)
class Tuning:
    """The search's result and the plan's place.

    Attributes:
        result: What the search found.
        plan_path: The plan: of the answer, or of the nearest candidate.
        failures: (library, scheme, why) of other libraries' candidates that could not be made.
        not_mapped: Why the weights were held in memory whole; empty where they were mapped.
        computed_on: Where it was computed, and why not on an accelerator that is there.
        notes: What was understood otherwise than asked.
    """

    result: TuneResult
    plan_path: Path
    failures: tuple[tuple[str, str, str], ...] = ()
    not_mapped: str = ""
    computed_on: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether the answer meets the budgets."""
        return self.result.feasible

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor tune --json``."""
        result, plan = self.result, self.result.plan
        return {
            "schema_version": 1,
            "feasible": result.feasible,
            "chosen": plan.scheme.name,
            "why": why(result),
            "plan_path": str(self.plan_path),
            "plan": plan.model_dump(mode="json"),
            "finalists": [finalist_document(row, result) for row in in_order(result)],
            "relaxation": [change.to_dict() for change in result.relaxation],
            "search": {
                "study": plan.search.study if plan.search else None,
                "trials": len(result.trials),
                "stopped": plan.search.stopped if plan.search else "completed",
                "score_spearman": result.quality.spearman,
                "score_ratio": result.quality.ratio,
                "effort": plan.search.effort if plan.search else None,
            },
            "computed_on": self.computed_on,
            "weights": {"mapped": not self.not_mapped, "reason": self.not_mapped or None},
            "notes": list(self.notes),
            "seconds": result.seconds,
            "backends_failed": [
                {"backend": name, "scheme": scheme, "reason": reason}
                for name, scheme, reason in self.failures
            ],
        }


def tune(
    model: str | Path,
    *,
    gpu: str = "auto",
    engine: str = "auto",
    budgets: BudgetsGiven = None,
    context: int = 4096,
    batch: int = 1,
    prefer: str = "balanced",
    output: str | Path = "plan.yaml",
    calibration: Sequence[str] = (),
    evaluation: Sequence[str] = (),
    slices: Sequence[str] = (),
    samples: int | None = None,
    sequence_length: int = 256,
    evaluation_sequences: int | None = None,
    trials: int = 60,
    time_budget: str | float | None = None,
    seed: int = 0,
    storage: str | None = None,
    sequential: bool = True,
    sampler: str = "tpe",
    effort: str = "full",
    backends: Sequence[str] = (),
    max_disk: str | int | None = None,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Tuning:
    """Find the quantization that meets the budgets best, measure it, and write its plan.

    The study lives beside the plan in ``<plan>.search``; the same call goes on where a stopped one
    was. Ctrl-C ends the search with a plan of the best so far, if anything was measured yet.

    Args:
        model: A folder with weights, or a Hugging Face id, which is downloaded.
        gpu: A device as people name it, ``cpu``, or ``auto`` for this machine's.
        engine: What will serve it, or ``auto``.
        budgets: Limits, or their texts by name; without any, at most 1% loss is aimed at.
        context: Tokens of context when serving, at least 1.
        batch: Sequences served at once, at least 1.
        prefer: What breaks ties: accuracy, size, speed or balanced.
        output: The plan's file.
        calibration: Text to calibrate on; by default ``builtin:general``, text of several kinds.
            ``self`` is text that the model writes itself; it is kept beside the plan.
        evaluation: Text to judge on, disjoint from the calibration; the built-in one by default.
        slices: Further texts as ``name=source``, each of which must meet the budgets on its own.
        samples: Calibration sequences; by default 32, and on an accelerator, where a pass over them
            costs little, up to 128 of a text that is long enough (not of a quick search).
        sequence_length: Tokens of a sequence.
        evaluation_sequences: Sequences that finalists are measured on, by default 32, or 16 of a
            quick search; up to eight times as many, if the text has them, where these leave a
            budget undecided.
        trials: Candidates scored.
        time_budget: Seconds, or text such as ``10m``, after which nothing new is started.
        seed: Of every random choice.
        storage: RDB URL of the study.
        sequential: Also measure the answer with each block fitted to the quantized ones before it.
        sampler: ``tpe``, ``nsga2`` (over the frontier of size and KL) or ``random``.
        effort: ``full``, or ``quick``: 0.4 of the time (SmolLM2) for codes that are a little worse,
            of one mixture and one uniform candidate (:mod:`advisor.search.effort`).
        backends: Other libraries, whose best uniform candidates, and own mixtures, are measured
            with the finalists.
        max_disk: The most that the search may add to the disk at a time: ``20GB``, or bytes.
            Statistics take 16 bits where only that fits. Where the model writes text, it first
            writes as many sequences at once as that allows.
        quantize_head: Let the head take fewer bits too, where the engine reads that.
        quantize_embedding: Let the embedding take fewer bits too, where the engine reads that.
        device: Where the search computes: ``auto`` (an accelerator of this machine with room for
            a block, else the CPU), ``cpu``, ``cuda`` or ``cuda:1``.
        progress: Called with events.

    Raises:
        InputError: A value breaks its rule; nothing is written then.
        BackendError: A named library is not installed, or cannot work here.
        KeyboardInterrupt: Ctrl-C came before anything was measured.
    """
    from advisor.search.effort import QUICK, effort_named
    from advisor.search.study import check_sampler
    from advisor.workflows.backend_offers import check_backend_names
    from advisor.workflows.texts import check_sources, parse_slices

    target = Path(output)
    check_lists(calibration=calibration, evaluation=evaluation, slices=slices, backends=backends)
    request = check_request(
        gpu=gpu, engine=engine, budgets=budgets, prefer=prefer,
        others=[
            lambda: check_counts(
                context=context, batch=batch, samples=samples, sequence_length=sequence_length,
                evaluation_sequences=evaluation_sequences, trials=trials, seed=seed,
            ),
            lambda: seconds_of(time_budget),
            lambda: disk_bytes_of(max_disk),
            lambda: check_output(target),
            lambda: check_sampler(sampler),
            lambda: effort_named(effort),
            lambda: check_sources(calibration),
            lambda: check_backend_names(backends),
            lambda: check_device_name(device),
        ],
        late=[
            lambda: check_sources(evaluation, own=False),
            lambda: parse_slices(slices),
            lambda: check_model_name(model),
        ],
    )  # fmt: skip
    hardware, engine_name, budgets = request.hardware, request.engine, request.budgets
    max_disk_bytes, seconds = disk_bytes_of(max_disk), seconds_of(time_budget)
    spent, folder = effort_named(effort), resolve_model_folder(model)

    from advisor.models.device import computing
    from advisor.models.load import check_model_folder, load_model
    from advisor.predict.device_memory import memory_notes
    from advisor.predict.models import load_modelspec
    from advisor.predict.positions import context_notes, served_context
    from advisor.search.tune import tune as search
    from advisor.workflows.backend_choices import Server
    from advisor.workflows.backend_offers import BackendOffers, named_backends
    from advisor.workflows.judging import draw_judges
    from advisor.workflows.own_text import OwnText, keep_own_text
    from advisor.workflows.texts import draw

    check_model_folder(folder)
    report = progress or ignore_progress
    spec = load_modelspec(folder)
    # The library's torch may see a device that this one does not.
    theirs = "cpu" if device.strip().lower() == "cpu" else "auto"
    chosen = named_backends(backends, Server(spec, hardware, engine_name), theirs)
    few = samples or _SAMPLES
    many = few if spent == QUICK else samples or _SAMPLES_ON_ACCELERATOR
    choice = device_for(device, spec, length=sequence_length, sequences=many)
    loaded = load_model(folder, device=choice.device)
    with computing(choice.device):
        drawn = draw(
            calibration, loaded.tokenizer, role="calibration", sequences=few,
            sequence_length=sequence_length, seed=seed,
            most=few if choice.device.type == "cpu" else many,
            own=OwnText(loaded, report, most_bytes=max_disk_bytes),
        )  # fmt: skip
    workdir = target.with_name(f"{target.name}.search")
    offers = BackendOffers(
        chosen, loaded, spec, hardware, engine_name, drawn, workdir / "backends", _steps(report),
        theirs,
    )  # fmt: skip
    judges = draw_judges(
        evaluation, slices, budgets, loaded.tokenizer,
        sequences=evaluation_sequences or spent.evaluation_sequences,
        sequence_length=sequence_length, seed=seed,
    )  # fmt: skip
    with computing(choice.device):
        result = search(
            loaded,
            spec,
            hardware,
            engine_name,
            budgets,
            calibration=drawn,
            evaluation=judges,
            workdir=workdir,
            trials=trials,
            time_budget_s=seconds,
            seed=seed,
            storage=storage,
            context=served_context(spec, context),
            batch=batch,
            prefer=prefer,
            sequential=sequential,
            sampler=sampler,
            effort=spent,
            outsiders=offers if chosen else None,
            max_disk_bytes=max_disk_bytes,
            quantize_head=quantize_head,
            quantize_embedding=quantize_embedding,
            progress=_forward(report),
        )
    result = _with_backend(result, offers)
    keep_own_text(drawn, target)
    save_plan(result.plan, target)
    return Tuning(
        result, target, tuple(offers.failures), loaded.not_mapped, describe_device(choice),
        context_notes(spec, context) + memory_notes(budgets, hardware),
    )  # fmt: skip


def _with_backend(result: TuneResult, offers: BackendOffers) -> TuneResult:
    """Return the result with the library in its plan, where another library's candidate won."""
    if result.answer.mixture.backend is None:
        return result
    return replace(result, plan=offers.planned(result.plan, result.answer.mixture))


def _steps(report: ProgressCallback) -> Callable[[str, str, int, int], None]:
    def step(name: str, stage: str, done: int, total: int) -> None:
        report(ProgressEvent(f"{name}: {stage}", done, total))

    return step


def _forward(report: ProgressCallback) -> Any:
    def forward(event: SearchEvent) -> None:
        report(ProgressEvent(event.stage, event.done, event.total, event.note))

    return forward
