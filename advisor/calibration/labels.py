"""Labels drawn from the model itself, and the gradients of the log-loss that they give."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def label_draws(tokens: Tensor, seed: int) -> Tensor:
    """Return the uniform numbers that decide a sequence's labels, float64 [length].

    They depend on the sequence itself, not on where it stands: sums of the parts of a text add up
    to those of the whole.

    Args:
        tokens: The sequence, int64 [length].
        seed: Of the collection.
    """
    content = tokens.cpu().contiguous().numpy().tobytes() + seed.to_bytes(8, "little", signed=True)
    drawn = int.from_bytes(hashlib.sha256(content).digest()[:7], "little")
    generator = torch.Generator().manual_seed(drawn)
    return torch.rand(len(tokens), generator=generator, dtype=torch.float64)


def residual_of(logits: Tensor, draws: Tensor) -> Tensor:
    """Return the model's chances less 1 at labels drawn from them, float32 [tokens, vocabulary]."""
    residual = torch.softmax(logits, dim=-1)
    cumulative = residual.cumsum(-1, dtype=torch.float64)
    threshold = draws.to(cumulative.device)[:, None] * cumulative[:, -1:]
    labels = torch.searchsorted(cumulative, threshold).clamp_max(residual.shape[1] - 1)
    ones = torch.ones_like(labels, dtype=residual.dtype)
    return residual.scatter_add_(1, labels, -ones)
