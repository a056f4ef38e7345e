"""What one changed weight does: the formula of :mod:`advisor.search.scores`, for one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.numerics.linear_algebra import half_product

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics


@dataclass(frozen=True, slots=True)
class Score:
    """What one option does to one module.

    Attributes:
        kl: Predicted effect on the model, nats per token.
        error: Mean squared change of the module's output rows, tr(ΔW H ΔWᵀ) per weighted token.
    """

    kl: float
    error: float


ModuleScores = Mapping[str, Score]
"""Module path to score, for one scheme under one setting; modules it does not fit are absent."""


def score_change(delta: Tensor, statistics: LayerStatistics) -> Score:
    """Return the score of a changed weight.

    Where there are more outputs than inputs the errors of rows are taken as uncorrelated, so that
    G's diagonal says it all: 0.97 to 1.01 of the score by all of G, which takes half of the time
    (gate and up of a block of SmolLM2-135M, three integer types by rounding and three by AWQ).

    Args:
        delta: Changed minus original weight, float32 [out, in].
        statistics: Of the module; without gradients, every output counts as much as another.
    """
    half = half_product(delta, statistics.second_moment)
    rows = (half * delta).sum(1).mul_(2.0)
    seen = statistics.rows if statistics.rows > 0 else 1.0
    error = float(rows.sum()) / seen
    gradient = statistics.gradient_moment
    if gradient is None:
        return Score(0.5 * error, error)
    if gradient.ndim == 2 and len(delta) > delta.shape[1]:
        gradient = gradient.diagonal()
    if gradient.ndim == 1:
        total = float((gradient * rows).sum())
    else:
        total = 2.0 * float((half.mul_(gradient @ delta)).sum())
    samples = seen * max(1, statistics.gradient_tokens)
    # tr(G ΔW H ΔWᵀ) is not negative; a tiny negative sum is rounding.
    return Score(max(0.0, 0.5 * total / samples), max(0.0, error))
