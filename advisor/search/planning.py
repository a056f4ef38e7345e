"""The plan of a finished, or interrupted, search."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

import advisor
from advisor.engines.verdict import verdict
from advisor.hardware.cpu import detect_cpu
from advisor.models import device as devices
from advisor.modelspec.outer import outer_modules
from advisor.plan.hashing import hash_model, model_name
from advisor.plan.schema import (
    Accuracy,
    BudgetLimits,
    CalibrationFit,
    ComputedOn,
    Engine,
    Expected,
    ExpertCoverage,
    Fallback,
    Kernel,
    ModelIdentity,
    Plan,
    Search,
    Serving,
    SliceResult,
    Text,
)
from advisor.search.assignment import plan_settings, scheme_choice
from advisor.search.effort import FULL, Effort
from advisor.search.limits import memory_bytes
from advisor.search.runners_up import rounded_score, runners_up, unmet
from advisor.search.study import SAMPLERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.budgets import Budgets
    from advisor.calibration.representativeness import Representativeness
    from advisor.calibration.tokens import TokenSequences
    from advisor.hardware.profile import HardwareProfile
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import ModelSpec
    from advisor.search.finalists import Finalist
    from advisor.search.goal import Goal
    from advisor.search.judges import Judges
    from advisor.search.mixture import Mixture

Stopped = Literal["completed", "interrupted", "time budget"]
_LIBRARIES = (
    "torch", "transformers", "tokenizers", "safetensors", "optuna", "bitsandbytes",
    "compressed-tensors",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What the search was asked, as far as the plan records it."""

    loaded: LoadedModel
    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    budgets: Budgets
    calibration: TokenSequences
    judges: Judges
    context: int
    batch: int
    format_name: str
    settings: QuantizationSettings


def build_plan(
    task: Task,
    goal: Goal,
    answer: Finalist,
    finalists: Sequence[Finalist],
    *,
    study: str,
    trials: int,
    seed: int,
    stopped: Stopped,
    spearman: float | None,
    overlap: float | None,
    fit: Representativeness | None = None,
    coverage: ExpertCoverage | None = None,
    fallbacks: Sequence[Fallback] = (),
    sampler: str = "tpe",
    effort: Effort = FULL,
    passed_over: Sequence[str] = (),
    best: Sequence[tuple[int, float]] = (),
    compact: bool = False,
) -> Plan:
    """Return the complete plan, but for the hashes of outputs.

    Args:
        task: What was asked.
        goal: What was wanted of it.
        answer: What was chosen.
        finalists: All that was measured.
        study: Study's name.
        trials: Finished trials.
        seed: Seed of the search.
        stopped: Why it ended.
        spearman: Rank correlation of predicted and measured KL.
        overlap: Share of the evaluation's token windows that the calibration has too.
        fit: How well the calibration text stands for the evaluation text.
        coverage: Calibration tokens that the experts of a mixture saw.
        fallbacks: Modules that could not take what the others took.
        sampler: Which one proposed the trials.
        effort: What the search spent.
        passed_over: Methods that were scored on a few blocks alone, with the reason.
        best: (trial, best objective from then on).
        compact: Whether the statistics were kept in 16 bits.
    """
    hashes = hash_model(task.loaded.folder)
    name, revision = model_name(task.loaded.folder)
    chosen = answer.mixture
    task = replace(task, format_name=chosen.format_name or task.format_name)
    judged = task.judges.evaluation.first(answer.measurement.sequences)
    return Plan(
        advisor_version=advisor.__version__,
        model=ModelIdentity(
            id=name,
            revision=revision,
            architecture=task.spec.architecture,
            parameters=task.spec.parameters,
            quantizable_parameters=task.spec.quantizable_parameters,
            config_sha256=hashes.config,
            tokenizer_sha256=hashes.tokenizer,
            weights_sha256=hashes.weights,
        ),
        hardware=task.hardware.to_plan(),
        engine=Engine(name=task.engine, kernel=_kernel(task, chosen)),
        serving=Serving(context=task.context, batch=task.batch),
        budgets=BudgetLimits(**task.budgets.to_dict()),  # type: ignore[arg-type]
        scheme=scheme_choice(
            chosen.name,
            task.format_name,
            chosen.assignment,
            [module.name for module in outer_modules(task.spec)],
        ),
        settings=plan_settings(chosen.family.settings(task.settings), chosen.family.samples),
        calibration=_text(task.calibration, compact=compact),
        calibration_fit=None if fit is None else CalibrationFit(**fit.to_dict()),
        expert_coverage=coverage,
        fallbacks=tuple(fallbacks),
        expected=_expected(task, answer),
        unmet=unmet(goal, answer),
        evaluation=_text(judged, overlap=overlap),
        slices={
            name: _text(text.first(answer.slices[name].sequences))
            for name, text in task.judges.slices.items()
        },
        search=Search(
            study=study,
            trials=trials,
            sampler=SAMPLERS[sampler],
            effort=effort.name,
            passed_over=tuple(passed_over),
            seed=seed,
            stopped=stopped,
            best=tuple(best),
            score_spearman=spearman,
        ),
        runners_up=runners_up(goal, answer, finalists),
        computed_on=computed_on(task.loaded.device),
        versions=versions(),
    )


def computed_on(device: torch.device) -> ComputedOn:
    """Describe what computes."""
    if device.type != "cpu":
        return ComputedOn(device=str(device), name=devices.device_name(device))
    return ComputedOn(device="cpu", name=detect_cpu().name, threads=torch.get_num_threads())


def _expected(task: Task, answer: Finalist) -> Expected:
    chosen, measured, accuracy = answer.mixture, answer.measurement, None
    if (found := answer.task) is not None:
        accuracy = Accuracy(
            task=found.name,
            questions=len(found.scores),
            value=found.accuracy,
            reference=found.reference_accuracy,
            drop=found.drop,
        )
    from advisor.predict.size import checkpoint_size

    quantized = {name: s for name, s in chosen.assignment.items() if s.is_quantized}
    size = checkpoint_size(task.spec, quantized, task.format_name)
    return Expected(
        size_bytes=chosen.size_bytes,
        bits_per_weight=round(chosen.bits_per_weight, 4),
        basis="measured",
        predicted_kl=rounded_score(chosen),
        memory_bytes=memory_bytes(
            task.spec, size, task.hardware, task.engine, context=task.context, batch=task.batch
        ),
        loss=measured.loss,
        kl=measured.kl,
        top1_agreement=measured.top1,
        perplexity=measured.perplexity,
        reference_perplexity=measured.reference_perplexity,
        slices={
            name: SliceResult(loss=text.loss, kl=text.kl, top1_agreement=text.top1)
            for name, text in answer.slices.items()
        },
        accuracy=accuracy,
    )


def _kernel(task: Task, chosen: Mixture) -> Kernel:
    """Return the verdict of the commonest scheme; a mixture has only schemes with a kernel."""
    counted = Counter(scheme for scheme in chosen.assignment.values() if scheme.is_quantized)
    if not counted:
        return Kernel(support="native", name=None, reason="every module stays in 16 bits")
    found = [
        verdict(
            task.engine,
            scheme,
            task.hardware,
            task.spec.linears,
            checkpoint_format=task.format_name,
        )
        for scheme, _ in counted.most_common()
    ]
    first, narrow = found[0], [each.dtype for each in found if each.dtype is not None]
    return Kernel(
        support=first.support,
        name=first.name,
        reason=first.reason,
        source=first.source,
        dtype=narrow[0] if narrow else None,
    )


def _text(
    sequences: TokenSequences, *, overlap: float | None = None, compact: bool = False
) -> Text:
    return Text(
        corpus=sequences.corpus,
        sha256=sequences.corpus_sha256,
        sequences=sequences.sequences,
        sequence_length=sequences.sequence_length,
        seed=sequences.seed,
        tokens_sha256=sequences.sha256,
        share_of_calibration_tokens=overlap,
        compact=compact or None,
    )


def versions() -> dict[str, str]:
    """Return the versions of everything that can change a result."""
    found = {"advisor": advisor.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
