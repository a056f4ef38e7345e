"""Which measurements are ended early: those of candidates that can no longer be the answer.

A candidate is measured sequence by sequence. It is hopeless once it is surely worse than one that
was measured in full and that it would have to beat, or once a quality budget is surely broken.
What was seen of it is kept and reported; it is never chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.evaluation.intervals import guarded_interval
from advisor.search.early_ends import above_limit, surely_above
from advisor.search.finalists import Finalist, excess_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from advisor.evaluation.measure import Measurement
    from advisor.search.goal import Goal
    from advisor.search.mixture import Mixture

_CONFIDENCE = 0.998
"""Of the interval whose lower end above a budget ends a measurement, after any sequence."""


@dataclass(frozen=True, slots=True)
class Ended:
    """An early end.

    Attributes:
        reason: In words.
        planned: The sequences that were to be measured.
    """

    reason: str
    planned: int


class Watch:
    """Decides after each sequence whether a candidate's measurement goes on.

    Attributes:
        ended: Why and when the measurement was ended; None while it goes on.
    """

    def __init__(
        self,
        mixture: Mixture,
        finalists: Sequence[Finalist],
        goal: Goal,
        *,
        uniform_in_full: bool = True,
    ) -> None:
        """Choose what the candidate has to beat.

        The first candidate is always measured in full.

        Args:
            mixture: The candidate.
            finalists: Measured so far.
            goal: The budgets.
            uniform_in_full: Whether the first uniform one is, too, so that plan and report say by
                how much the answer beats it, and not just that it surely does.
        """
        self.ended: Ended | None = None
        self._goal = goal
        full = [f for f in finalists if f.in_full]
        whole = uniform_in_full and mixture.is_uniform
        peers = [f for f in full if f.mixture.is_uniform or not whole]
        self._may_stop = bool(peers)
        self._rival = _rival(mixture, peers, goal)

    def of_text(self, name: str, planned: int) -> Callable[[Measurement], bool]:
        """Return what says that the measurement of a text ends; told of it after each sequence.

        Args:
            name: Of the slice; empty for the main text, on which candidates compete.
            planned: The text's sequences.
        """
        rival = None if name else self._rival
        rival_name, worse = "", None
        if rival is not None:
            rival_name = rival.name
            worse = surely_above(_measure_of(rival.measurement, self._goal)[:planned].tolist())
        bounds: dict[str, list[float]] = {}
        limits = {label: above_limit(limit) for label, limit in _limits(self._goal).items()}

        def is_hopeless(seen: Measurement) -> bool:
            if not self._may_stop or seen.sequences >= planned:
                return False
            why = ""
            for label, above in limits.items():
                known = bounds.setdefault(label, [])
                known.append(guarded_interval(_budgeted(seen, label), _CONFIDENCE).low)
                if above(known):
                    why = f"the {label} budget is surely broken{f' on {name}' if name else ''}"
            if worse is not None and worse(_measure_of(seen, self._goal).tolist()):
                why = why or f"surely worse than {rival_name}"
            if why:
                count = f"after {seen.sequences} of {planned} sequences"
                self.ended = Ended(f"stopped early {count}: {why}", planned)
            return bool(why)

        return is_hopeless


def _rival(mixture: Mixture, peers: Sequence[Finalist], goal: Goal) -> Finalist | None:
    """Return whom a candidate must beat to be the answer: none that is surely worse can be."""
    if goal.smallest:  # one that is no larger: whatever budget it breaks, the worse breaks too
        able = [f for f in peers if f.mixture.size_bytes <= mixture.size_bytes]
    else:
        able = [f for f in peers if f.passes and excess_bytes(f.mixture, goal) == 0]
    return min(able, key=lambda f: float(_measure_of(f.measurement, goal).mean()), default=None)


def _measure_of(measurement: Measurement, goal: Goal) -> NDArray[np.float64]:
    """Return what candidates compete on, per sequence: less is better."""
    on_loss = goal.smallest and goal.max_loss is not None
    return measurement.sequence_nll if on_loss else measurement.sequence_kl


def _limits(goal: Goal) -> dict[str, float]:
    """Return the budgets that sequences decide, as limits of a mean over them."""
    found = {}
    if goal.max_loss is not None:
        found["loss"] = math.log1p(goal.max_loss)
    if goal.max_kl is not None:
        found["KL"] = goal.max_kl
    return found


def _budgeted(measurement: Measurement, label: str) -> NDArray[np.float64]:
    """Return the values whose mean a budget limits."""
    if label == "KL":
        return measurement.sequence_kl
    return measurement.sequence_nll - measurement.sequence_reference_nll
