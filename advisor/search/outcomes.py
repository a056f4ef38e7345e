"""What a trial proposes to remember, and how a study remembers it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a proposal.

    Attributes:
        value: The objective, to be minimised; infinite for rejected proposals.
        constraints: Each is met where it is zero or negative.
        attributes: What to remember of the trial (JSON values).
        rejected: Why arithmetic ruled it out before it cost anything, or None.
        objectives: What ``nsga2`` minimises together.
    """

    value: float
    constraints: tuple[float, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    rejected: str | None = None
    objectives: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One finished trial, as the study stores it.

    Attributes:
        number: Its number in the study.
        parameters: What was proposed.
        value: The objective (of several the last); None for rejected ones.
        feasible: Whether every constraint was met.
        rejected: Why it was rejected, or None.
        attributes: What was remembered.
    """

    number: int
    parameters: Mapping[str, Any]
    value: float | None
    feasible: bool
    rejected: str | None
    attributes: Mapping[str, Any]


def best_so_far(records: Sequence[TrialRecord]) -> list[tuple[int, float]]:
    """Return (trial from 1, value) wherever a trial within the budgets beat all before it."""
    found: list[tuple[int, float]] = []
    for count, record in enumerate(records, start=1):
        value = record.value if record.feasible else None
        if value is not None and (not found or value < found[-1][1]):
            found.append((count, float(f"{value:.6g}")))
    return found
