"""When nothing fits: the smallest changes that would, sorted by how little they ask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from advisor.budgets import loosened
from advisor.engines import engine_name, verdict
from advisor.engines.shapes import SPLITTING_ENGINES
from advisor.predict.candidate import (
    Candidate,
    Violation,
    Workload,
    judge,
    served,
)
from advisor.predict.device_memory import beyond_device, memory_limit
from advisor.predict.explain import relaxed_in_words
from advisor.predict.ranking import LIKELY_COLLAPSE, RUINED, is_makeshift

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec

_OTHER_GPUS = (
    "l4", "rtx4090", "rtx5090", "l40s", "rtx6000ada", "a100-sxm-80", "h100-sxm", "h200-sxm", "b200",
)  # fmt: skip
_MOST = 6
_LARGEST_ASK = 20.0
_MOST_CARDS = 8


@dataclass(frozen=True, slots=True)
class Relaxation:
    """One change after which something fits.

    Attributes:
        budget: What changes: a budget, ``context``, ``batch`` or ``gpu``.
        before: Its value now.
        after: The value that would do, in round figures.
        candidate: Scheme that fits then.
        ask: Relative size of the change: 0.1 asks a tenth more.
        text: The change in words, with the option that makes it.
    """

    budget: str
    before: float | str | None
    after: float | str
    candidate: str
    ask: float
    text: str

    def to_dict(self) -> dict[str, Any]:
        """Return the relaxation for JSON."""
        return {
            "budget": self.budget,
            "from": self.before,
            "to": self.after,
            "candidate": self.candidate,
            "text": self.text,
        }


def relaxations(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    workload: Workload,
) -> tuple[Relaxation, ...]:
    """Return the smallest single changes that make a candidate feasible, the least first."""
    runnable = [c for c in candidates if c.kernel.support != "none" and c.problem is None]
    sound = [
        c for c in runnable
        if c.loss.collapse_risk <= LIKELY_COLLAPSE and c.loss.expected <= RUINED
    ]  # fmt: skip
    # Nobody is asked for more memory to get a ruined model, or one the engine merely tries.
    plain = [c for c in sound or runnable if not is_makeshift(c)]
    runnable = plain or sound or runnable
    found = _budget_changes(runnable, budgets, hardware)
    found += _smaller_workloads(spec, runnable, hardware, engine, budgets, workload)
    found += _other_gpus(spec, runnable, hardware, engine, budgets, workload)
    if not any(entry.text.startswith("--") and entry.budget != "gpu" for entry in found):
        # Neither a budget nor the workload alone: both together, before a larger device.
        found += _smaller_and_looser(spec, runnable, hardware, engine, budgets, workload)
    if not found:
        found = _two_budgets(runnable, budgets, hardware)
    found = [entry for entry in found if entry.ask <= _LARGEST_ASK]
    return tuple(sorted(found, key=lambda entry: entry.ask)[:_MOST])


def _ask(violation: Violation) -> float:
    if violation.value is None or not violation.limit:
        return float("inf") if violation.value is None else 10.0
    ratio = violation.value / violation.limit
    return (1 / ratio if ratio < 1 else ratio) - 1 if ratio > 0 else float("inf")


def _budget_changes(
    candidates: Sequence[Candidate], budgets: Budgets, hardware: HardwareProfile
) -> list[Relaxation]:
    """For each budget, the candidate that breaks it alone and by the least."""
    best: dict[str, Relaxation] = {}
    for candidate in candidates:
        if len(candidate.violations) != 1:
            continue
        violation = candidate.violations[0]
        ask = _ask(violation)
        known = best.get(violation.budget)
        if violation.value is not None and (known is None or ask < known.ask):
            best[violation.budget] = Relaxation(
                violation.budget, violation.limit, loosened(violation.budget, violation.value),
                candidate.name, ask, _in_words(candidate.name, (violation,), budgets, hardware),
            )  # fmt: skip
    return list(best.values())


def _two_budgets(
    candidates: Sequence[Candidate], budgets: Budgets, hardware: HardwareProfile
) -> list[Relaxation]:
    """Several budgets at once, where no single one is enough."""
    found = []
    for candidate in candidates:
        broken = candidate.violations
        if len(broken) < 2 or any(entry.value is None for entry in broken):
            continue
        asks = [_ask(entry) for entry in broken]
        largest = broken[asks.index(max(asks))]
        needed = loosened(largest.budget, largest.value or 0.0)
        text = _in_words(candidate.name, broken, budgets, hardware)
        found.append(
            Relaxation(largest.budget, largest.limit, needed, candidate.name, sum(asks), text)
        )
    return sorted(found, key=lambda entry: entry.ask)[:2]


def _in_words(
    name: str, violations: Sequence[Violation], budgets: Budgets, hardware: HardwareProfile
) -> str:
    parts = []
    for entry in violations:
        needed, limit = loosened(entry.budget, entry.value or 0.0), entry.limit or 0.0
        assumed = entry.budget == "max_memory" and beyond_device(budgets, hardware, needed)
        if assumed and budgets.max_memory_bytes is not None:
            limit = hardware.memory_bytes or limit
        parts.append(relaxed_in_words(entry.budget, limit, needed, assumed=assumed))
    return f"{' and '.join(parts)}, with {name}"


def _too_heavy(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return those that fail on memory or speed alone."""
    return [
        c for c in candidates
        if c.violations and all(v.budget in ("max_memory", "min_speed") for v in c.violations)
    ]  # fmt: skip


def _smaller_workloads(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    workload: Workload,
) -> list[Relaxation]:
    """Less context or fewer sequences, for candidates that fail on memory or speed alone."""
    stuck = _too_heavy(candidates)
    found: list[Relaxation] = []
    limit = memory_limit(budgets, hardware)
    for what, start in (("context", workload.context), ("batch", workload.batch)):
        best: Relaxation | None = None
        for candidate in stuck:
            value = start
            while value > (256 if what == "context" else 1):
                # Contexts in steps of a quarter: finer ones say nothing to a person.
                value = max(1, value * 3 // 4)
                if best is not None and value <= int(best.after):
                    break
                smaller = replace(workload, **{what: value})
                again = served(candidate, spec, hardware, engine, smaller)
                if judge(again, budgets, limit).feasible:
                    ask = start / value - 1
                    text = f"--{what} {value} instead of {start}, with {candidate.name}"
                    best = Relaxation(what, start, value, candidate.name, ask, text)
                    break
        if best is not None:
            found.append(best)
    return found


_QUALITY = ("max_loss", "max_kl", "max_accuracy_drop")


def _smaller_and_looser(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    workload: Workload,
) -> list[Relaxation]:
    """Less context or fewer sequences and more loss, for candidates that fail on both."""
    free = replace(budgets, **dict.fromkeys(_QUALITY), task=None)
    best: dict[str, Relaxation] = {}
    for candidate in candidates:
        loss = [entry for entry in candidate.violations if entry.budget in _QUALITY]
        heavy = tuple(entry for entry in candidate.violations if entry.budget not in _QUALITY)
        if not loss or not heavy or any(entry.value is None for entry in loss):
            continue
        small = [replace(candidate, violations=heavy)]
        more = sum(_ask(entry) for entry in loss)
        words = _in_words(candidate.name, loss, budgets, hardware)
        for entry in _smaller_workloads(spec, small, hardware, engine, free, workload):
            alone = entry.text.removesuffix(f", with {candidate.name}")
            both = replace(entry, ask=entry.ask + more, text=f"{alone} and {words}")
            if entry.budget not in best or both.ask < best[entry.budget].ask:
                best[entry.budget] = both
    return list(best.values())


def _other_gpus(
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    workload: Workload,
) -> list[Relaxation]:
    """A larger or faster GPU, and more of the same, for what fails on memory or speed."""
    from advisor.hardware.catalogue import find_profile

    asked, there = budgets.max_memory_bytes, hardware.memory_bytes
    if hardware.kind == "cpu" or (asked is not None and (there is None or asked <= there)):
        return []
    stuck = sorted(_too_heavy(candidates), key=lambda c: c.loss.expected)
    larger = (find_profile(name) for name in _OTHER_GPUS)
    choices = (
        [gpu for gpu in larger if (gpu.memory_bytes or 0) > (hardware.memory_bytes or 0)],
        _more_of_the_same(spec, hardware, engine),
    )
    found = []
    for others in choices:
        for other in others:
            name = _first_on(other, spec, stuck, engine, budgets, workload)
            if name is not None:
                held = max(1, (hardware.memory_bytes or 1) * hardware.count)
                ask = (other.memory_bytes or 0) * other.count / held
                text = f"--gpu {other.argument}, with {name}"
                found.append(
                    Relaxation("gpu", hardware.argument, other.argument, name, max(0.5, ask), text)
                )
                break
    return found


def _more_of_the_same(
    spec: ModelSpec, hardware: HardwareProfile, engine: str
) -> list[HardwareProfile]:
    """Return more cards of one kind, by numbers that divide the KV heads."""
    if engine_name(engine) not in SPLITTING_ENGINES:
        return []
    heads = [layer.kv_heads for layer in spec.attention if not layer.is_latent]
    counts = (2 * hardware.count * 2**power for power in range(3))
    return [
        hardware.model_copy(update={"count": count})
        for count in counts
        if count <= _MOST_CARDS and not any(number % count for number in heads)
    ]


def _first_on(
    other: HardwareProfile,
    spec: ModelSpec,
    candidates: Sequence[Candidate],
    engine: str,
    budgets: Budgets,
    workload: Workload,
) -> str | None:
    """Return the first candidate that meets the budgets on another device."""
    for candidate in candidates:
        kernel = verdict(engine, candidate.scheme, other, spec.linears)
        again = served(replace(candidate, kernel=kernel), spec, other, engine, workload)
        if judge(again, budgets, memory_limit(budgets, other)).feasible:
            return candidate.name
    return None
