"""The answer: every scheme predicted, ranked and explained, before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.engines.outer import OPTIONS, outer_problems
from advisor.engines.rules import load_engine
from advisor.errors import InputError, did_you_mean, join_errors
from advisor.modelspec.outer import outer_modules
from advisor.predict.candidate import (
    SCHEME_NAMES,
    Candidate,
    Workload,
    baseline_speed,
    judge,
    make_candidate,
    memory_limit,
)
from advisor.predict.explain import serve_command, tune_command, why, why_not
from advisor.predict.ladder import Rung, ladder
from advisor.predict.positions import context_notes, served_context
from advisor.predict.ranking import PREFERENCES, rank, ties
from advisor.predict.relax import Relaxation, relaxations
from advisor.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.modelspec.outer import OuterModule

    Maker = Callable[[Scheme, str | None], bool]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Every candidate in rank order, and what to do next.

    Attributes:
        spec: The model.
        hardware: The device.
        engine: Name of the engine.
        budgets: The limits as the user gave them.
        workload: Context and batch.
        prefer: What broke ties.
        candidates: In rank order, the ruled-out ones at the end.
        tied: Feasible candidates that are no worse than the first, as far as is known.
        relaxation: Smallest changes that would do, where nothing fits.
        ladder: Largest context and batch of the first candidates.
        ends: Embedding and head, where they were to be quantized too.
        notes: What was understood otherwise than asked.
    """

    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    budgets: Budgets
    workload: Workload
    prefer: str
    candidates: tuple[Candidate, ...]
    tied: tuple[Candidate, ...]
    relaxation: tuple[Relaxation, ...] | None
    ladder: tuple[Rung, ...] = ()
    ends: tuple[OuterModule, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recommended(self) -> Candidate | None:
        """The first feasible candidate, or None."""
        best = self.candidates[0] if self.candidates else None
        return best if best is not None and best.feasible else None

    @property
    def why(self) -> str | None:
        """Two sentences on the first place."""
        return why(self.candidates, self.tied, self.prefer)

    @property
    def serve(self) -> str | None:
        """Command that serves the recommended checkpoint."""
        best = self.recommended
        if best is None:
            return None
        path = "quantized/" if best.scheme.is_quantized else self.spec.id
        if best.format == "gguf":
            path = f"{self.spec.id.rpartition('/')[2]}-{best.scheme.weight}.gguf"
        return serve_command(
            self.engine, path, self.workload.context, self.workload.batch,
            devices=self.hardware.count, dtype=best.kernel.dtype,
        )  # fmt: skip

    @property
    def tune(self) -> str | None:
        """Command that measures; None where Advisor makes nothing that fits."""
        if not any(c.tunable for c in self.candidates if c.feasible and c.scheme.is_quantized):
            return None
        return tune_command(
            self.spec.id, self.hardware.argument, self.engine, self.budgets,
            self.workload.context, self.workload.batch, self.prefer,
            sorted({OPTIONS[module.role] for module in self.ends}),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``recommend --json``."""
        best = self.recommended
        relaxed = None
        if self.relaxation is not None:
            relaxed = [entry.to_dict() for entry in self.relaxation]
        rows = []
        for candidate in self.candidates:
            row = candidate.to_dict()
            row["why_not"] = why_not(candidate)
            rows.append(row)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": model_dict(self.spec),
            "hardware": self.hardware.to_dict(),
            "engine": self.engine,
            "budgets": self.budgets.to_dict(),
            "context": self.workload.context,
            "batch": self.workload.batch,
            "prefer": self.prefer,
            "recommended": None if best is None else best.name,
            "why": self.why,
            "ties": [candidate.name for candidate in self.tied],
            "candidates": rows,
            "relaxation": relaxed,
            "ladder": [rung.to_dict() for rung in self.ladder],
            "bound": None if best is None else best.speed.words or None,
            "serve": self.serve,
            "tune": self.tune,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """One scheme, predicted, feasible or not."""

    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    candidate: Candidate
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``predict --json``."""
        row = self.candidate.to_dict()
        row["why_not"] = why_not(self.candidate)
        row["notes"] = list(self.notes)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": model_dict(self.spec),
            "hardware": self.hardware.to_dict(),
            "engine": self.engine,
            "candidate": row,
        }


def recommend(
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    *,
    context: int = 4096,
    batch: int = 1,
    prefer: str = "balanced",
    schemes: Sequence[Scheme] | None = None,
    makes: Maker | None = None,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
) -> Recommendation:
    """Predict and rank every scheme for a model on a device.

    Args:
        spec: The model.
        hardware: The device; ``count`` > 1 asks for tensor parallelism over that many.
        engine: Name of the engine that will serve it.
        budgets: The limits.
        context: Tokens of each sequence, at least 1.
        batch: Sequences at once, at least 1.
        prefer: ``accuracy``, ``size``, ``speed`` or ``balanced``.
        schemes: Schemes to weigh instead of the usual ones.
        makes: Whether Advisor quantizes to a scheme and writes its format; None = all of them.
        quantize_head: The head takes each scheme too, where the engine reads that.
        quantize_embedding: The embedding takes each scheme too, where the engine reads that.

    Raises:
        InputError: Unknown engine or preference, a context or batch below 1, or no format in which
            the engine reads a quantized head or embedding of this model.
    """
    workload = _workload(spec, context, batch)
    if prefer not in PREFERENCES:
        raise InputError(
            f"prefer must be one of {', '.join(PREFERENCES)}, but got {prefer!r}."
            f"{did_you_mean(prefer, PREFERENCES)}"
        )
    wanted = schemes if schemes is not None else [parse_scheme(name) for name in SCHEME_NAMES]
    ends = _ends(spec, engine, quantize_head, quantize_embedding)
    baseline = baseline_speed(spec, hardware, engine, workload)
    limit = memory_limit(budgets, hardware)
    judged = [
        judge(
            _marked(make_candidate(spec, s, hardware, engine, workload, baseline, ends), makes),
            budgets,
            limit,
        )
        for s in wanted
    ]
    ranked = rank(judged, prefer)
    relaxation = None
    if not any(candidate.feasible for candidate in ranked):
        relaxation = relaxations(spec, ranked, hardware, engine, budgets, workload)
    return Recommendation(
        spec=spec,
        hardware=hardware,
        engine=engine,
        budgets=budgets,
        workload=workload,
        prefer=prefer,
        candidates=tuple(ranked),
        tied=tuple(ties(ranked, prefer)),
        relaxation=relaxation,
        ladder=ladder(spec, hardware, engine, ranked, workload, limit),
        ends=ends,
        notes=context_notes(spec, context),
    )


def _ends(spec: ModelSpec, engine: str, head: bool, embedding: bool) -> tuple[OuterModule, ...]:
    """Return the ends of the model that are to be quantized.

    Raises:
        InputError: The engine reads some of them quantized in no format.
    """
    modules = outer_modules(spec, head=head, embedding=embedding)
    formats = [rule.format for rule in load_engine(engine).formats]
    problems = []
    for module in modules:
        complaints = [outer_problems(engine, name, [module]) for name in dict.fromkeys(formats)]
        if all(complaints):
            # The mixtures' format, or the first that holds quantized weights.
            usual = [mixture.format for mixture in load_engine(engine).mixtures]
            usual += [name for name in formats if name != "safetensors"]
            problems += outer_problems(engine, usual[0], [module])
    if problems:
        raise InputError(join_errors(problems))
    return modules


def _marked(candidate: Candidate, makes: Maker | None) -> Candidate:
    """Say whether Advisor makes the checkpoint itself; 16 bits need no making."""
    if makes is None or not candidate.scheme.is_quantized:
        return candidate
    return replace(candidate, tunable=makes(candidate.scheme, candidate.format))


def predict(
    spec: ModelSpec,
    scheme: Scheme,
    hardware: HardwareProfile,
    engine: str,
    *,
    context: int = 4096,
    batch: int = 1,
    budgets: Budgets | None = None,
    makes: Maker | None = None,
    quantize_head: bool = False,
    quantize_embedding: bool = False,
) -> Prediction:
    """Predict everything of one scheme, feasible or not.

    Raises:
        InputError: Unknown engine, a context or batch below 1, or the engine does not read the
            head or the embedding in this scheme.
    """
    from advisor.budgets import Budgets as NoBudgets

    ends = _ends(spec, engine, quantize_head, quantize_embedding)
    workload = _workload(spec, context, batch)
    candidate = make_candidate(spec, scheme, hardware, engine, workload, ends=ends)
    if left := [module for module in ends if module.name not in candidate.outer]:
        problems = outer_problems(engine, candidate.format or "", left)
        raise InputError(
            join_errors(problems)
            if problems
            else f"{left[0].name} ({left[0].linear.out_features}x{left[0].linear.in_features}) "
            f"takes no {scheme} on {hardware.name}. Drop {OPTIONS[left[0].role]}, or name a "
            "weight-only scheme whose groups divide its rows."
        )
    limits = budgets or NoBudgets()
    judged = judge(_marked(candidate, makes), limits, memory_limit(limits, hardware))
    return Prediction(spec, hardware, engine, judged, context_notes(spec, context))


def model_dict(spec: ModelSpec) -> dict[str, Any]:
    """Return the ``model`` object of the JSON documents."""
    return {
        "id": spec.id,
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "quantizable_parameters": spec.quantizable_parameters,
        "active_parameters": spec.active_parameters,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": spec.dtype,
        "source": spec.source,
    }


def _workload(spec: ModelSpec, context: int, batch: int) -> Workload:
    problems = [
        f"{name} must be at least 1, but got {value}."
        for name, value in (("context", context), ("batch", batch))
        if value < 1
    ]
    if problems:
        raise InputError(" ".join(problems))
    return Workload(served_context(spec, context), batch)
