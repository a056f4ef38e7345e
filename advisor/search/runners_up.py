"""The runners-up of a plan, and why each lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.plan.schema import RunnerUp
from advisor.search.finalists import Finalist, excess_bytes, is_tie

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.search.goal import Goal
    from advisor.search.mixture import Mixture

_TOO_LARGE = "{:,} bytes more than the budgets on size, memory and speed leave"


def runners_up(goal: Goal, winner: Finalist, finalists: Sequence[Finalist]) -> tuple[RunnerUp, ...]:
    """Return what else was measured, best first, each with why it lost."""
    others = [f for f in finalists if f.mixture != winner.mixture]
    others.sort(key=lambda f: (not f.passes, f.mixture.size_bytes if goal.smallest else 0,
                               f.measured_kl))  # fmt: skip
    return tuple(
        RunnerUp(
            name=other.name,
            size_bytes=other.mixture.size_bytes,
            basis="measured",
            loss=other.measurement.loss,
            kl=other.measurement.kl,
            predicted_kl=rounded_score(other.mixture),
            reason=f"{_why(goal, winner, other)} ({_made_by(other.mixture)})",
        )
        for other in others
    )


def _made_by(mixture: Mixture) -> str:
    """Return the library, or the settings of our own."""
    return f"by {mixture.backend}" if mixture.backend else mixture.family.describe()


def rounded_score(mixture: Mixture) -> float | None:
    """Return a candidate's score, to four digits; None where it has none."""
    return float(f"{mixture.predicted_kl:.4g}") if mixture.predicted_kl > 0 else None


def unmet(goal: Goal, answer: Finalist) -> str | None:
    """Return which budget the nearest candidate breaks; None for an answer."""
    if (over := excess_bytes(answer.mixture, goal)) > 0:
        return _TOO_LARGE.format(over)
    return None if answer.passes else answer.decision.reason


def _why(goal: Goal, winner: Finalist, other: Finalist) -> str:
    """Return why a measured candidate is not the answer."""
    if (over := excess_bytes(other.mixture, goal)) > 0:
        return _TOO_LARGE.format(over)
    if not other.passes:
        return other.decision.reason
    more = other.mixture.size_bytes - winner.mixture.size_bytes
    if goal.smallest and more > 0:
        return f"{more:,} bytes larger"
    if is_tie(other, winner):
        return f"a tie in KL, and {more:,} bytes larger" if more > 0 else "a tie in KL"
    return f"KL {other.measured_kl:.3g} against {winner.measured_kl:.3g}"
