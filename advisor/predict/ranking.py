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

_LOSS_UNIT, _LOSS_PRICE = 0.02, 1.2
"""A perplexity increase of 2% weighs as much as 1.2 halvings of the size or doublings of the speed;
each doubling of 1 + loss/2% as much again: the evidence is no finer than that. A third more loss,
the median error of a prediction, then weighs less than a third more speed."""
_LOSS_UNHEARD, _NOISE_SHARE = 0.01, 0.25
"""The first 1% of perplexity counts a quarter: two published tables of one cell differ by as
much."""
PREFILL_WEIGHT = 0.15
"""Prefill, where INT8 and FP8 arithmetic pays, beside decoding."""
_COLLAPSE_PRICE = 4.0
_LOSS_NOISE, _LOSS_TIE = 0.005, 0.3
"""Expected losses are alike within half a percent of perplexity, or within 30% of the smaller:
two tables of the same cell differ by that much."""
_TIES = {"accuracy": 0.01, "size": 0.01, "speed": 0.05, "balanced": 0.1}


def rank(candidates: Sequence[Candidate], prefer: str) -> list[Candidate]:
    """Order candidates: feasible ones first, the best by the preference at the top."""
    base = next((c for c in candidates if not c.scheme.is_quantized), None)
    # Where Advisor makes nothing that fits (llama.cpp), what others make is not held back.
    makes = any(c.feasible and c.tunable and c.scheme.is_quantized for c in candidates)
    return sorted(candidates, key=lambda candidate: sort_key(candidate, prefer, base, makes))


def sort_key(
    candidate: Candidate, prefer: str, base: Candidate | None, makes: bool = True
) -> tuple[float, ...]:
    """Return the key by which a candidate is ordered, small is good.

    The preference's own figure comes first, cut into steps of what is a tie; then loss, size and
    speed decide among ties. What has to be made with other software comes after what Advisor
    makes itself, if it makes anything that fits (``makes``).
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
    elsewhere = makes and not candidate.tunable
    last = 4.0 * ruined + 2.0 * is_makeshift(candidate) + float(elsewhere)
    return (float(not candidate.feasible), last, order, first, loss, size, -speed)


def is_makeshift(candidate: Candidate) -> bool:
    """Return whether the kernel only emulates the scheme or the engine calls it experimental."""
    return candidate.kernel.support == "emulated" or candidate.kernel.experimental


def merit(candidate: Candidate, base: Candidate | None) -> float:
    """Return the balance of size, speed and loss: halvings and doublings, less the loss."""
    size = candidate.size_bytes
    smaller = 0.0
    if size and base is not None and base.size_bytes:
        smaller = math.log2(base.size_bytes / size)
    faster = math.log2(candidate.speedup) if candidate.speedup else 0.0
    prefill = candidate.speed.prefill
    if prefill is not None and base is not None and base.speed.prefill is not None:
        faster += PREFILL_WEIGHT * math.log2(prefill.expected / base.speed.prefill.expected)
    loss = candidate.loss.expected
    counted = loss - (1 - _NOISE_SHARE) * min(loss, _LOSS_UNHEARD)
    price = _LOSS_PRICE * math.log2(1 + counted / _LOSS_UNIT)
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
        if is_makeshift(other) == is_makeshift(first)
        and other.tunable == first.tunable
        and _tied(first, other, prefer)
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
    """Return whether size and speed are about equal and the losses are within what is known.

    The intervals themselves overlap for almost any two schemes: most of their width is the model's
    own, which two schemes of one model share.
    """
    sizes = (first.size_bytes or 1, other.size_bytes or 1)
    if abs(math.log(sizes[0] / sizes[1])) > _TIES["balanced"] / 2:
        return False
    if first.speedup and other.speedup:
        ratio = first.speedup / other.speedup
        if abs(math.log(ratio)) > _TIES["balanced"]:
            return False
    losses = (first.loss.expected, other.loss.expected)
    return max(losses) - min(losses) < max(_LOSS_NOISE, _LOSS_TIE * min(losses))


def _step(value: float, width: float) -> float:
    return math.floor(value / width) if math.isfinite(value) else value
