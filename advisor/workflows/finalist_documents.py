"""What ``tune`` says of its finalists: their rows, their order, and why one is the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.evaluation.tasks import TaskMeasurement
    from advisor.search.finalists import Finalist
    from advisor.search.tune import TuneResult


def in_order(result: TuneResult) -> list[Finalist]:
    """Return the finalists: the answer, then those that pass, by measured KL."""
    return sorted(
        result.finalists,
        key=lambda row: (row is not result.answer, not row.passes, row.measured_kl),
    )


def finalist_document(row: Finalist, result: TuneResult) -> dict[str, Any]:
    """Return a finalist as ``advisor tune --json`` lists it."""
    measured = row.measurement
    return {
        "name": row.name,
        "method": row.mixture.family.method,
        "sequential": row.mixture.family.sequential,
        "backend": row.mixture.backend,
        "chosen": row is result.answer,
        "settings": "" if row.mixture.backend else row.mixture.family.describe(),
        "size_bytes": row.mixture.size_bytes,
        "bits_per_weight": row.mixture.bits_per_weight,
        "predicted_kl": row.mixture.predicted_kl,
        "outer": {
            name: str(row.mixture.assignment[name])
            for name in result.plan.scheme.outer
            if name in row.mixture.assignment
        },
        "kl": measured.kl.model_dump(),
        "loss": measured.loss.model_dump(),
        "top1_agreement": measured.top1.model_dump(),
        "perplexity": measured.perplexity,
        "sequences": measured.sequences,
        "stopped_early": not row.in_full,
        "slices": {
            name: {"kl": text.kl.model_dump(), "loss": text.loss.model_dump()}
            for name, text in row.slices.items()
        },
        "accuracy": None if row.task is None else _accuracy(row.task),
        "verdict": row.decision.verdict,
        "reason": row.decision.reason,
    }


def _accuracy(task: TaskMeasurement) -> dict[str, Any]:
    return {
        "task": task.name,
        "questions": len(task.scores),
        "value": task.accuracy,
        "reference": task.reference_accuracy,
        "drop": task.drop.model_dump(),
    }


def why(result: TuneResult) -> str:
    """Say in a sentence why this is the answer."""
    goal, plan = result.goal, result.plan
    measured = [row for row in result.finalists if row.mixture.is_uniform]
    uniform = [row for row in measured if row.in_full] or measured
    best = min(uniform, key=lambda row: row.measured_kl, default=None)
    aim = "the smallest that meets the budgets" if goal.smallest else "the least loss that fits"
    if goal.assumed:
        aim = (
            f"the smallest within {goal.max_loss:.0%} of perplexity, which is aimed at where no "
            "budget is given"
        )
    if plan.expected.kl is None or best is None or best.name == plan.scheme.name:
        if len(result.finalists) == 1:
            return f"{aim}, the only one that was measured"
        return f"{aim}, of {len(result.finalists)} that were measured"
    if goal.smallest:
        passing = [row for row in uniform if row.passes and row.name != plan.scheme.name]
        if not passing:
            if len(uniform) == 1:
                return f"{aim}: the only uniform one that was measured does not"
            return f"{aim}: of {len(uniform)} uniform ones that were measured none does"
        least = min(passing, key=lambda row: row.mixture.size_bytes)
        bytes_ = _more_bytes(plan.expected.size_bytes, least.mixture.size_bytes)
        than = "as" if bytes_.startswith("as") else "than"
        return f"{aim}: {bytes_} {than} the smallest uniform one that does ({least.name})"
    found, where = plan.expected.kl.value, ""
    if not best.in_full and result.answer is not None:
        seen = best.measurement.sequences
        found = result.answer.measurement.first(seen).kl.value
        where = f", on the {seen} sequences that were enough to tell"
    ratio = found / max(best.measured_kl, 1e-12)
    bytes_ = _more_bytes(plan.expected.size_bytes, best.mixture.size_bytes)
    return (
        f"{aim}: {ratio:.2f} times the KL of the best uniform one ({best.name}) with {bytes_}"
        f"{where}"
    )


def _more_bytes(found: int, other: int) -> str:
    """Say how many bytes one has beside another."""
    more = found / other - 1
    if abs(more) < 0.0005:
        return "as many bytes"
    return f"{abs(more):.1%} {'more' if more > 0 else 'fewer'} bytes"
