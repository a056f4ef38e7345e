"""The order of candidates inside the feasible set, and which of them are ties."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.predict.candidate import Candidate

LIKELY_COLLAPSE = 0.5
"""Risk of collapse from which a candidate comes after all others, whatever is preferred."""

RUINED = 0.2
"""Expected perplexity increase from which the same holds: nobody serves such a model by choice."""

PREFERENCES: tuple[str, ...] = ("accuracy", "size", "speed", "balanced")

_LOSS_UNIT, _LOSS_PRICE = 0.02, 1.5
"""A perplexity increase of 2% weighs as much as one and a half halvings of the size or doublings
of the speed; each doubling of 1 + loss/2% as much again: the evidence is no finer than that."""
_COLLAPSE_PRICE = 4.0
_TIES = {"accuracy": 0.01, "size": 0.01, "speed": 0.05, "balanced": 0.1}


def rank(candidates: Sequence[Candidate], prefer: str) -> list[Candidate]:
    """Order candidates: feasible ones first, the best by the preference at the top."""
    base = next((c for c in candidates if not c.scheme.is_quantized), None)
    return sorted(candidates, key=lambda candidate: sort_key(candidate, prefer, base))


def sort_key(candidate: Candidate, prefer: str, base: Candidate | None) -> tuple[float, ...]:
    """Return the key by which a candidate is ordered, small is good.

    The preference's own figure comes first, cut into steps of what is a tie; then loss, size and
    speed decide among ties.
    """
    size = float(candidate.size_bytes or math.inf)
    loss = candidate.loss.expected
    speed = candidate.speed.decode.expected if candidate.speed.decode else 0.0
    risk = candidate.loss.collapse_risk
    first = {
        "accuracy": _step(loss + 0.05 * risk, _TIES["accuracy"] / 2),
        "size": _step(math.log(max(size, 1.0)), _TIES["size"]) if math.isfinite(size) else math.inf,
        "speed": -_step(math.log(max(speed, 1e-3)), _TIES["speed"]),
        "balanced": -merit(candidate, base),
    }[prefer]
    order = len(candidate.violations) if candidate.kernel.support != "none" else 9
    # What loads but is slow, experimental or ruined comes after everything that simply works.
    ruined = risk > LIKELY_COLLAPSE or loss > RUINED
    last = 2.0 * ruined + float(is_makeshift(candidate))
    return (float(not candidate.feasible), last, order, first, loss, size, -speed)


def is_makeshift(candidate: Candidate) -> bool:
    """Return whether the kernel only emulates the scheme or the engine calls it experimental."""
    return candidate.kernel.support == "emulated" or candidate.kernel.experimental


def merit(candidate: Candidate, base: Candidate | None) -> float:
    """Return the balance of size, speed and loss: halvings and doublings, less loss over 2%."""
    size = candidate.size_bytes
    smaller = 0.0
    if size and base is not None and base.size_bytes:
        smaller = math.log2(base.size_bytes / size)
    faster = math.log2(candidate.speedup) if candidate.speedup else 0.0
    price = _LOSS_PRICE * math.log2(1 + candidate.loss.expected / _LOSS_UNIT)
    price += _COLLAPSE_PRICE * candidate.loss.collapse_risk
    return smaller + faster - price


def ties(ranked: Sequence[Candidate], prefer: str) -> list[Candidate]:
    """Return the feasible candidates that nothing known tells from the first one."""
    feasible = [candidate for candidate in ranked if candidate.feasible]
    if not feasible:
        return []
    first = feasible[0]
    return [
        other
        for other in feasible[1:]
        if is_makeshift(other) == is_makeshift(first) and _tied(first, other, prefer)
    ]


def _tied(first: Candidate, other: Candidate, prefer: str) -> bool:
    if prefer == "accuracy":
        return abs(other.loss.expected - first.loss.expected) < _TIES["accuracy"] / 2
    if prefer == "size":
        sizes = (first.size_bytes or 1, other.size_bytes or 1)
        return abs(math.log(sizes[0] / sizes[1])) < _TIES["size"]
    if prefer == "speed":
        if first.speed.decode is None or other.speed.decode is None:
            return False
        ratio = first.speed.decode.expected / other.speed.decode.expected
        return abs(math.log(ratio)) < _TIES["speed"]
    return _alike(first, other)


def _alike(first: Candidate, other: Candidate) -> bool:
    """Return whether size and speed are about equal and the intervals of the loss overlap."""
    sizes = (first.size_bytes or 1, other.size_bytes or 1)
    if abs(math.log(sizes[0] / sizes[1])) > _TIES["balanced"] / 2:
        return False
    if first.speedup and other.speedup:
        ratio = first.speedup / other.speedup
        if abs(math.log(ratio)) > _TIES["balanced"]:
            return False
    return first.loss.low <= other.loss.high and other.loss.low <= first.loss.high


def _step(value: float, width: float) -> float:
    return math.floor(value / width) if math.isfinite(value) else value
