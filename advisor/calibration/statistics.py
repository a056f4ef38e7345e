"""LayerStatistics: what one calibration pass remembers of a linear, mergeable exactly."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Sums over calibration tokens at one linear; nothing is normalised, so merging is exact.

    Attributes:
        tokens: Number of input rows summed.
        second_moment: float32 [in, in], H = Σ w x xᵀ. With a backward pass a token's weight w is
            the squared norm of the output gradients of all linears that read the input; without,
            every token counts 1.
        absolute_maximum: float32 [in], max |x| per input channel.
        absolute_sum: float32 [in], Σ |x|; divided by ``tokens`` it is AWQ's mean magnitude.
        gradient_tokens: Number of output-gradient rows summed; 0 when there was no backward pass.
        gradient_moment: float32 [out, out] (or its diagonal, [out]), G = Σ g gᵀ, where g is what
            reaches the linear's output of vectors sent back from the logits, whose second moment
            is the Fisher information of these (:mod:`advisor.calibration.fisher`); None when
            there was no backward pass.
        moment_weight: Σ w of the second moment; None where every token counts 1.

    Why weights: the Fisher information of a linear is E[g gᵀ ⊗ x xᵀ], which E[g gᵀ] ⊗ E[x xᵀ]
    stands for only if sizes of g and x are independent. They are not: tokens that serve attention
    as a sink have large x and hardly any g. E[|g|² x xᵀ] is the exact partial trace over outputs.
    Measured on SmolLM2-135M (re-parameterised; 32×256 calibration and 16×256 evaluation tokens of
    the built-in text; damping 0.01), KL of uniform GPTQ fitted to the unweighted and to the
    weighted moment: int4 g64 sym 0.260 and 0.119; int4 g32 asym, static groups in activation order,
    with coordinate descent, 0.0647 and 0.0436. Weights |g| instead of |g|² gave 0.137 and 0.0424.
    On the small trained model in ``examples/`` nothing was gained.

    Reference: GuidedQuant, arXiv:2505.07004, section 3 (second moments weighted by gradients).
    Differs from the paper: one weight for all outputs that share an input, gradients of the
    model's own outputs.
    """

    tokens: int
    second_moment: Tensor
    absolute_maximum: Tensor
    absolute_sum: Tensor
    gradient_tokens: int = 0
    gradient_moment: Tensor | None = None
    moment_weight: float | None = None

    @property
    def rows(self) -> float:
        """What the second moment is divided by to make it a mean: the sum of its weights."""
        return float(self.tokens) if self.moment_weight is None else self.moment_weight


def merge(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """Return the statistics of the tokens of both; inputs are not modified.

    A full gradient moment merged with a diagonal one gives the diagonal of the sum.

    Raises:
        InputError: They belong to linears of different shapes, or only one has gradients.
    """
    if a.second_moment.shape != b.second_moment.shape:
        raise InputError(
            "statistics of different linears cannot be merged: their second moments have shapes "
            f"{tuple(a.second_moment.shape)} and {tuple(b.second_moment.shape)}."
        )
    return LayerStatistics(
        tokens=a.tokens + b.tokens,
        second_moment=a.second_moment + b.second_moment,
        absolute_maximum=torch.maximum(a.absolute_maximum, b.absolute_maximum),
        absolute_sum=a.absolute_sum + b.absolute_sum,
        gradient_tokens=a.gradient_tokens + b.gradient_tokens,
        gradient_moment=_merge_gradients(a.gradient_moment, b.gradient_moment),
        moment_weight=_merge_weights(a, b),
    )


def _merge_weights(a: LayerStatistics, b: LayerStatistics) -> float | None:
    """Add the weights of two second moments, both weighted or both not."""
    if (a.moment_weight is None) != (b.moment_weight is None):
        raise InputError(
            "statistics with weighted and unweighted second moments cannot be merged: collect both "
            "the same way."
        )
    return None if a.moment_weight is None else a.rows + b.rows


def _merge_gradients(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two gradient moments, on the diagonal where one has nothing else."""
    if a is None and b is None:
        return None
    if a is None or b is None:
        raise InputError(
            "statistics with and without gradients cannot be merged: collect both the same way."
        )
    if a.ndim != b.ndim:
        a, b = (moment if moment.ndim == 1 else moment.diagonal() for moment in (a, b))
    if a.shape != b.shape:
        raise InputError(
            "statistics of different linears cannot be merged: their gradient moments have shapes "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    return a + b


def scale_inputs(statistics: LayerStatistics, scales: Tensor) -> LayerStatistics:
    """Return the statistics that a linear has after its inputs are divided by scales.

    Args:
        statistics: Statistics of the linear as it was.
        scales: Positive divisor of every input channel, shape [in]; the weight's columns are
            multiplied by the same scales, so outputs and their gradients stay.

    Raises:
        InputError: A scale is not positive and finite, or there are not ``in`` of them.
    """
    expected = statistics.absolute_maximum.shape
    if scales.shape != expected:
        raise InputError(f"scales must have shape {tuple(expected)}, got {tuple(scales.shape)}.")
    if not bool((scales > 0).all() and scales.isfinite().all()):
        raise InputError("scales of input channels must be positive and finite.")
    inverse = 1.0 / scales.to(torch.float32)
    return replace(
        statistics,
        second_moment=statistics.second_moment * inverse[:, None] * inverse[None, :],
        absolute_maximum=statistics.absolute_maximum * inverse,
        absolute_sum=statistics.absolute_sum * inverse,
    )
