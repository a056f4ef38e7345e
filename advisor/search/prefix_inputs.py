"""What linears read behind quantized blocks, and the weights that make up for the difference."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from advisor.calibration.moments import SecondMoment
from advisor.calibration.statistics import LayerStatistics

if TYPE_CHECKING:
    from torch import Tensor


class PrefixInputs:
    """Inputs x̂ of linears behind quantized blocks, beside the inputs x of the unquantized model.

    Attributes:
        statistics: Of x̂; no gradients, which serve scores alone.
    """

    def __init__(self, statistics: LayerStatistics, cross: Tensor, damping: float) -> None:
        """Keep the sums.

        Args:
            statistics: Of x̂.
            cross: Σ x x̂ᵀ, float32 [in, in].
            damping: Added to the diagonals, as a share of the mean diagonal of Σ x̂ x̂ᵀ.
        """
        self.statistics = statistics
        self._cross = cross
        self._damping = damping

    def forget(self) -> None:
        """Drop what targets are made of, once all are made; the statistics stay."""
        for name in self.__dict__.keys() - {"statistics", "_damping"}:
            del self.__dict__[name]

    def target(self, weight: Tensor, correction: float) -> Tensor:
        """Return the weight, moved towards the one that gives W x from x̂.

        That one, W', minimises Σ ‖W x - W' x̂‖² + λ‖W - W'‖²: W' (H + λI) = W (C + λI) for
        H = Σ x̂ x̂ᵀ and C = Σ x x̂ᵀ.

        Args:
            weight: W, float32 [out, in]; not modified.
            correction: Share of the way from W to W', in [0, 1].
        """
        if correction == 0:
            return weight
        factor, shift = self._solver
        values = weight.float()
        if len(weight) < len(shift):
            moved = torch.cholesky_solve((values @ shift).T, factor).T
        else:
            moved = values @ self._whole_shift
        return torch.add(values, moved, alpha=correction).to(weight.dtype)

    @cached_property
    def _whole_shift(self) -> Tensor:
        """Return (C - H)(H + λI)^-1, what weights of many rows are multiplied by."""
        factor, shift = self._solver
        return torch.cholesky_solve(shift.T, factor).T.contiguous()

    @cached_property
    def _solver(self) -> tuple[Tensor, Tensor]:
        """Return the Cholesky factor of H + λI, and C - H, both float32.

        W' = W (C + λI)(H + λI)^-1 = W + W (C - H)(H + λI)^-1; the second part is small, so its
        rounding is too. Only the factorization takes float64.
        """
        moment = self.statistics.second_moment.to(torch.float64, copy=True)
        shift = self._cross.to(torch.float64, copy=True).sub_(moment).float()
        mean = float(moment.diagonal().mean())
        moment.diagonal().add_(self._damping * (mean if mean > 0 else 1.0))
        return torch.linalg.cholesky(moment).float(), shift


class PrefixSums:
    """Sums over the two streams of one input group."""

    def __init__(self, size: int, device: torch.device) -> None:
        """Start at zero, for inputs of that size."""
        self._moment = SecondMoment(size, device)
        self._cross = torch.zeros(size, size, device=device)
        self._maximum = torch.zeros(size, device=device)
        self._absolute_sum = torch.zeros(size, device=device)
        self._tokens = 0
        self._weight = 0.0

    def add(self, exact: Tensor, quantized: Tensor, weights: Tensor) -> None:
        """Add rows [tokens, in] of the unquantized model and of the quantized one.

        Args:
            exact: Of the unquantized model.
            quantized: Behind the quantized blocks.
            weights: How much each row counts, [tokens].
        """
        magnitudes = quantized.abs()
        torch.maximum(self._maximum, magnitudes.amax(0), out=self._maximum)
        self._absolute_sum += magnitudes.sum(0)
        roots = weights.sqrt()[:, None]
        self._moment.add(quantized * roots)
        self._cross.addmm_((exact * roots).T, quantized * roots)
        self._tokens += len(quantized)
        self._weight += float(weights.sum(dtype=torch.float64))

    def finish(self, damping: float) -> PrefixInputs:
        """Return the sums, where the rows were; nothing is added after."""
        statistics = LayerStatistics(
            tokens=self._tokens,
            second_moment=self._moment.whole(),
            absolute_maximum=self._maximum,
            absolute_sum=self._absolute_sum,
            moment_weight=self._weight,
        )
        return PrefixInputs(statistics, self._cross, damping)
