"""Statistics of the embedding and the head, which come with the backward pass for nothing.

The head is a linear with V outputs: its gradients are those that are sent back
(:mod:`advisor.calibration.fisher`), and of G, [V, V], only the diagonal is kept, Σ g². Its inputs
are the final norm's outputs, weighted by |g|² as everywhere.

An embedding is looked up. A changed row ΔE_t moves the stream wherever the token t stands, so the
Fisher's quadratic form is Σ_t ΔE_t M_t ΔE_tᵀ with M_t = Σ g gᵀ over the places of t, g being the
gradient at the first block's input. M_t is taken as r_t M: M = Σ g gᵀ over all places, and r_t the
share of |g|² that falls on t, which keeps both partial traces. So M stands where H stands for a
linear, and r where the diagonal of G does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.calibration.moments import SecondMoment
from advisor.models.blocks import rows_at_once

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.modelspec import LinearSpec


class HeadSums:
    """Sums of the head's inputs and output gradients, a step for each prefix of the samples."""

    def __init__(self, linear: LinearSpec, device: torch.device) -> None:
        """Start at zero.

        Args:
            linear: Name and shape of what is kept.
            device: Where the rows will be.
        """
        self._name = linear.name
        self._moment = SecondMoment(linear.in_features, device)
        self._diagonal = torch.zeros(linear.out_features, device=device)
        self._maximum = torch.zeros(linear.in_features, device=device)
        self._sum = torch.zeros(linear.in_features, device=device)
        self._weight = 0.0
        self._weights: list[Tensor] = []
        self._step = 0
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def add(self, rows: Tensor, gradients: Tensor) -> None:
        """Add tokens.

        Args:
            rows: What the head reads, [tokens, in].
            gradients: Of the log-loss at its output, [tokens, out].
        """
        rows = rows.to(torch.float32)
        weights = torch.empty(len(rows), device=rows.device)
        count = rows_at_once(gradients.shape[1], gradients.device)
        for start in range(0, len(rows), count):
            squares = gradients[start : start + count].to(torch.float32).square()
            self._diagonal += squares.sum(0)
            weights[start : start + count] = squares.sum(1)
        self._moment.add(rows * weights.sqrt()[:, None])
        self._weight += float(weights.sum(dtype=torch.float64))
        self._weights.append(weights.cpu())
        self._maximum = torch.maximum(self._maximum, rows.abs().amax(0))
        self._sum += rows.abs().sum(0)

    def end_prefix(self) -> None:
        """Keep the sums since the last call as one step."""
        key = f"{self._step}/{self._name}"
        self.gradients[f"{key}/moment"] = self._moment.take()
        self.gradients[f"{key}/weight"] = torch.tensor(self._weight, dtype=torch.float64)
        self.inputs[f"{key}/maximum"] = self._maximum.cpu().clone()
        self.inputs[f"{key}/sum"] = self._sum.cpu().clone()
        self._maximum.zero_()
        self._sum.zero_()
        self._weight = 0.0
        self._step += 1

    def finish(self) -> None:
        """Keep what is not cut by prefixes: the gradients' diagonal, and every token's weight."""
        self.gradients[self._name] = self._diagonal.cpu()
        self.gradients[f"{self._name}/weights"] = torch.cat(self._weights)


class EmbeddingSums:
    """Sums over the gradients at the first block's input, a step for each prefix."""

    def __init__(self, linear: LinearSpec, device: torch.device | str = "cpu") -> None:
        """Start at zero.

        Args:
            linear: Name and shape of what is kept.
            device: Where the gradients will be.
        """
        self._name = linear.name
        self._width = linear.in_features
        self._moment = SecondMoment(linear.in_features, device)
        self._shares = torch.zeros(linear.out_features)
        self._tokens = 0
        self._step = 0
        self.inputs: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def add(self, tokens: Tensor, gradients: Tensor) -> None:
        """Add a sequence.

        Args:
            tokens: int64 [length], on the CPU.
            gradients: Of the log-loss at their embeddings, [length, width].
        """
        rows = gradients.to(torch.float32)
        self._moment.add(rows)
        # On the CPU, which adds the places of a token in their order.
        self._shares.index_add_(0, tokens, rows.square().sum(1).cpu())
        self._tokens += len(rows)

    def end_prefix(self) -> None:
        """Keep the sums since the last call as one step."""
        key = f"{self._step}/{self._name}"
        self.gradients[f"{key}/moment"] = self._moment.take()
        self.gradients[f"{key}/weight"] = torch.tensor(float(self._tokens), dtype=torch.float64)
        for kind in ("maximum", "sum"):
            self.inputs[f"{key}/{kind}"] = torch.zeros(self._width)
        self._tokens = 0
        self._step += 1

    def finish(self) -> None:
        """Keep Σ |g|² of every token of the vocabulary, whatever the prefix."""
        self.gradients[self._name] = self._shares.clone()
