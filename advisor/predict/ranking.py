"""The order of candidates inside the feasible set, and which of them are ties."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.predict.candidate import Candidate

LIKELY_COLLAPSE = 0.5
"""Risk of collapse from which a candidate comes after all others, whatever is preferred."""

PREFERENCES: tuple[str, ...] = ("accuracy", "size", "speed", "balanced")

_LOSS_UNIT = 0.02
"""Perplexity increase that weighs as much as halving the size or doubling the speed."""
_COLLAPSE_PRICE = 4.0
_TIES = {"accuracy": 0.01, "size": 0.01, "speed": 0.05, "balanced": 0.1}
_EMULATED_PRICE = 1.0
"""Doublings that an emulated or experimental kernel must win to be preferred."""


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
    gone = float(risk > LIKELY_COLLAPSE)
    return (float(not candidate.feasible), gone, order, first, loss, size, -speed)


def merit(candidate: Candidate, base: Candidate | None) -> float:
    """Return the balance of size, speed and loss: halvings and doublings, less loss over 2%."""
    size = candidate.size_bytes
    smaller = 0.0
    if size and base is not None and base.size_bytes:
        smaller = math.log2(base.size_bytes / size)
    faster = math.log2(candidate.speedup) if candidate.speedup else 0.0
    price = candidate.loss.expected / _LOSS_UNIT + _COLLAPSE_PRICE * candidate.loss.collapse_risk
    if candidate.kernel.support == "emulated" or candidate.kernel.experimental:
        price += _EMULATED_PRICE
    return smaller + faster - price


def ties(ranked: Sequence[Candidate], prefer: str) -> list[Candidate]:
    """Return the feasible candidates that nothing known tells from the first one."""
    feasible = [candidate for candidate in ranked if candidate.feasible]
    if not feasible:
        return []
    first = feasible[0]
    base = next((c for c in ranked if not c.scheme.is_quantized), None)
    return [other for other in feasible[1:] if _tied(first, other, prefer, base)]


def _tied(first: Candidate, other: Candidate, prefer: str, base: Candidate | None) -> bool:
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
    return abs(merit(first, base) - merit(other, base)) < _TIES["balanced"]


def _step(value: float, width: float) -> float:
    return math.floor(value / width) if math.isfinite(value) else value
