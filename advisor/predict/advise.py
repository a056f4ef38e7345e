"""The answer: every scheme predicted, ranked and explained, before anything is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.engines.outer import OPTIONS, outer_problems
from advisor.engines.rules import load_engine
from advisor.errors import InputError, did_you_mean, join_errors
from advisor.modelspec.outer import outer_modules
from advisor.predict.answers import Prediction, Recommendation
from advisor.predict.candidate import (
    SCHEME_NAMES,
    Candidate,
    Workload,
    baseline_speed,
    judge,
    make_candidate,
)
from advisor.predict.device_memory import memory_limit, memory_notes
from advisor.predict.ladder import ladder
from advisor.predict.positions import context_notes, served_context
from advisor.predict.published import quantized_notes
from advisor.predict.ranking import PREFERENCES, rank, ties
from advisor.predict.relax import relaxations
from advisor.predict.sharing import check_sharing
from advisor.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.modelspec.outer import OuterModule

    Maker = Callable[[Scheme, str | None], bool]


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
    check_sharing(spec, hardware, engine)
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
        notes=_notes(spec, hardware, engine, budgets, context, batch),
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
    check_sharing(spec, hardware, engine)
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
    notes = _notes(spec, hardware, engine, limits, context, batch)
    return Prediction(spec, hardware, engine, judged, notes)


def _notes(
    spec: ModelSpec, hardware: HardwareProfile, engine: str, budgets: Budgets, context: int,
    batch: int,
) -> tuple[str, ...]:  # fmt: skip
    """Return what is understood otherwise than asked."""
    published = quantized_notes(
        spec, hardware, engine, context=served_context(spec, context), batch=batch,
        limit=memory_limit(budgets, hardware),
    )  # fmt: skip
    return published + context_notes(spec, context) + memory_notes(budgets, hardware)


def _workload(spec: ModelSpec, context: int, batch: int) -> Workload:
    problems = [
        f"{name} must be at least 1, but got {value}."
        for name, value in (("context", context), ("batch", batch))
        if value < 1
    ]
    if problems:
        raise InputError(" ".join(problems))
    return Workload(served_context(spec, context), batch)
