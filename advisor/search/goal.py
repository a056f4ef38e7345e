"""What the search is after: the limits that arithmetic decides, and those that measuring does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advisor.budgets import Budgets
    from advisor.search.pace import Pace

DEFAULT_MAX_LOSS = 0.01
"""Aim when no budget says anything about quality and none about size."""
_SMALLEST_KL = 1e-6
_KL_PER_ACCURACY = 5.0


@dataclass(frozen=True, slots=True)
class Goal:
    """The budgets as the search uses them.

    Attributes:
        max_bytes: Largest checkpoint, from the size, memory and speed budgets; None for no limit.
        max_loss: Largest relative increase of perplexity.
        max_kl: Largest mean KL, nats per token.
        smallest: Whether the smallest answer within the quality budgets is wanted; otherwise the
            best answer within the size.
        max_accuracy_drop: Largest drop of accuracy on ``task``.
        task: Name of the benchmark.
        assumed: Whether ``max_loss`` is an assumption, as no budget was given that decides.
        pace: A limit on time that bytes do not decide.
    """

    max_bytes: int | None
    max_loss: float | None
    max_kl: float | None
    smallest: bool
    assumed: bool = False
    max_accuracy_drop: float | None = None
    task: str | None = None
    pace: Pace | None = None

    @property
    def target_kl(self) -> float:
        """KL at which the quality budgets are spent, if loss and KL agree; infinite for none.

        For labels drawn from the model itself, the expected log-loss rises by the KL exactly.
        What accuracy stands for is a guess that the first measurements correct.
        """
        limits = [math.inf]
        if self.max_loss is not None:
            limits.append(max(_SMALLEST_KL, math.log1p(self.max_loss)))
        if self.max_kl is not None:
            limits.append(max(_SMALLEST_KL, self.max_kl))
        if self.max_accuracy_drop is not None and len(limits) == 1:
            limits.append(max(_SMALLEST_KL, _KL_PER_ACCURACY * self.max_accuracy_drop))
        return min(limits)

    @property
    def has_quality_budget(self) -> bool:
        """Whether there is anything to measure against."""
        limits = (self.max_loss, self.max_kl, self.max_accuracy_drop)
        return any(limit is not None for limit in limits)


def goal_of(budgets: Budgets, prefer: str, max_bytes: int | None, pace: Pace | None = None) -> Goal:
    """Return the goal that budgets and preference stand for.

    With a size limit the best quality within it is wanted, unless ``prefer`` is ``size`` (or
    ``speed``, since decoding is bound by the bytes read) and a quality budget says what suffices.
    Without a size limit the smallest checkpoint within the quality budget is wanted.

    Args:
        budgets: The user's.
        prefer: ``accuracy``, ``size``, ``speed`` or ``balanced``.
        max_bytes: Largest checkpoint that size, memory and speed budgets allow together.
        pace: A limit on time that bytes do not decide.
    """
    accuracy = budgets.max_accuracy_drop
    quality = any(limit is not None for limit in (budgets.max_loss, budgets.max_kl, accuracy))
    # A device's memory alone does not say how small the answer should be.
    size_given = budgets.max_size_bytes is not None or budgets.max_memory_bytes is not None
    size_given = size_given or budgets.min_tokens_per_s is not None
    if not quality and not size_given:
        return Goal(max_bytes, DEFAULT_MAX_LOSS, None, smallest=True, assumed=True, pace=pace)
    smallest = quality and (not size_given or prefer in ("size", "speed"))
    return Goal(
        max_bytes, budgets.max_loss, budgets.max_kl, smallest,
        max_accuracy_drop=accuracy, task=budgets.task, pace=pace,
    )  # fmt: skip
