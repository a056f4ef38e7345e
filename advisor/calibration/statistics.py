"""LayerStatistics: what one calibration pass remembers of a linear, mergeable exactly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Sums over calibration tokens at one linear; nothing is normalised, so merging is exact.

    Attributes:
        tokens: Number of input rows summed.
        second_moment: float32 [in, in], H = Σ x xᵀ.
        absolute_maximum: float32 [in], max |x| per input channel.
        absolute_sum: float32 [in], Σ |x|; divided by ``tokens`` it is AWQ's mean magnitude.
        gradient_tokens: Number of output-gradient rows summed; 0 when there was no backward pass.
        gradient_moment: float32 [out, out] (or its diagonal, [out]), G = Σ g gᵀ, where g is the
            gradient of the summed token log-loss, with labels drawn from the model itself, at
            the linear's output; None when there was no backward pass.
    """

    tokens: int
    second_moment: Tensor
    absolute_maximum: Tensor
    absolute_sum: Tensor
    gradient_tokens: int = 0
    gradient_moment: Tensor | None = None
