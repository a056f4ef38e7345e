"""Measure a checkpoint again, as its plan was measured, and compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.evaluation.measure import Measurement
    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.plan.schema import Accuracy, Interval, Plan

_KL_TOLERANCE = 0.02
"""Measured KL may differ from the plan's by this share (other machines sum in other orders) ..."""
_KL_FLOOR = 2e-5
"""... or by this many nats, where KL itself is near rounding noise."""
_ANSWERS_TOLERANCE = 0.01
"""Share of a benchmark's answers that may differ."""


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer."""

    name: str
    passed: bool
    detail: str


def measure_again(
    plan: Plan, checkpoint: Checkpoint, loaded: LoadedModel, progress: Callable[[int, int], None]
) -> tuple[list[Check], dict[str, Any] | None]:
    """Measure on the plan's evaluation text and compare with what the plan expects."""
    if plan.evaluation is None:
        return [], None
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.evaluation.tasks import load_benchmark
    from advisor.plan.folders import cache_root
    from advisor.workflows.checkpoints import contents
    from advisor.workflows.texts import redraw

    texts = {"": (plan.evaluation, plan.expected.kl)}
    for name, text in plan.slices.items():
        result = plan.expected.slices.get(name)
        texts[name] = (text, None if result is None else result.kl)
    drawn = {
        name: redraw(text, loaded.tokenizer, f"slice {name}" if name else "evaluation")
        for name, (text, _) in texts.items()
    }
    references = {
        name: Reference.compute(loaded, sequences, cache_root())
        for name, sequences in drawn.items()
    }
    weights, replaced = contents(checkpoint, loaded)
    accuracy = None
    with quantized_model(loaded.model, weights, replaced) as model:
        found = {
            name: measure(model, reference, progress=progress)
            for name, reference in references.items()
        }
        if plan.expected.accuracy is not None:
            benchmark = load_benchmark(plan.expected.accuracy.task, loaded.tokenizer)
            accuracy = float(benchmark.evaluate(model).mean())
    measurement = found[""]
    measured: dict[str, Any] = {
        "kl": measurement.kl.model_dump(),
        "loss": measurement.loss.model_dump(),
        "top1_agreement": measurement.top1.model_dump(),
        "perplexity": measurement.perplexity,
    }
    if plan.slices:
        measured["slices"] = {
            name: {"kl": result.kl.model_dump(), "loss": result.loss.model_dump()}
            for name, result in found.items()
            if name
        }
    known = plan.expected.basis == "measured"
    checks = [
        _drift(f"quality on {name}" if name else "quality", found[name],
               expected if known else None)
        for name, (_, expected) in texts.items()
    ]  # fmt: skip
    if accuracy is not None and plan.expected.accuracy is not None:
        measured["accuracy"] = accuracy
        checks.append(_accuracy_drift(accuracy, plan.expected.accuracy))
    return checks, measured


def _drift(name: str, measurement: Measurement, expected: Interval | None) -> Check:
    """Compare a KL with the plan's."""
    if expected is None:
        return Check(name, True, f"KL {measurement.kl.value:.5f}; the plan says none")
    drift = measurement.kl.value - expected.value
    allowed = max(_KL_FLOOR, _KL_TOLERANCE * abs(expected.value))
    detail = (
        f"KL {measurement.kl.value:.5f}, the plan says {expected.value:.5f} "
        f"(drift {drift:+.5f}, allowed {allowed:.5f}); loss {measurement.loss.value * 100:.2f}%"
    )
    return Check(name, abs(drift) <= allowed, detail)


def _accuracy_drift(accuracy: float, expected: Accuracy) -> Check:
    """Compare an accuracy with the plan's: answers that hang by a hair may differ elsewhere."""
    allowed = max(1.0, _ANSWERS_TOLERANCE * expected.questions) / expected.questions
    detail = (
        f"{accuracy:.2%} of {expected.questions} questions right, the plan says "
        f"{expected.value:.2%} (allowed drift {allowed:.2%})"
    )
    return Check(
        f"accuracy on {expected.task}", abs(accuracy - expected.value) <= allowed + 1e-9, detail
    )
