"""What the search says while it runs, and what it hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.plan.schema import Plan
    from advisor.search.finalists import Finalist, ScoreQuality
    from advisor.search.goal import Goal
    from advisor.search.outcomes import TrialRecord
    from advisor.search.relaxing import Relaxation


@dataclass(frozen=True, slots=True)
class SearchEvent:
    """One step of the search.

    Attributes:
        stage: What is being done, in words.
        done: Steps finished.
        total: Steps in all; None when not known.
        note: The best so far, or what is at work.
    """

    stage: str
    done: int
    total: int | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What the search found.

    Attributes:
        plan: The plan of the answer; of the nearest candidate where nothing meets the budgets.
        finalists: All that was measured.
        trials: The study's finished trials.
        feasible: Whether the answer meets the budgets.
        relaxation: Smallest changes of the budgets that have an answer; empty when feasible.
        quality: How well the scores predicted what was measured.
        goal: The budgets as the search used them.
        seconds: Wall time.
        answer: Of the finalists, the one that the plan describes.
    """

    plan: Plan
    finalists: tuple[Finalist, ...]
    trials: tuple[TrialRecord, ...]
    feasible: bool
    relaxation: tuple[Relaxation, ...]
    quality: ScoreQuality
    goal: Goal
    seconds: float
    answer: Finalist
