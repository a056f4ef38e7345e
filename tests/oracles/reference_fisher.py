"""What a token's output sends back, written out in float64: random signs on the Fisher's root."""

from __future__ import annotations

import torch
from torch import Tensor


def sent_back(logits: Tensor, source: torch.Generator) -> Tensor:
    """Σ_j ε_j √p_j (e_j - p) of every row, float64 [tokens, vocabulary]."""
    size = logits.shape[1]
    rows = []
    for row in logits.double():
        chances = row.softmax(-1)
        numbers = [
            int(torch.empty(1, dtype=torch.int32).random_(0, 2**30, generator=source))
            for _ in range(-(-size // 30))
        ]
        total = torch.zeros(size, dtype=torch.float64)
        for j in range(size):
            sign = -1 if numbers[j // 30] >> (j % 30) & 1 else 1
            one = torch.zeros(size, dtype=torch.float64)
            one[j] = 1
            total += sign * chances[j].sqrt() * (one - chances)
        rows.append(total)
    return torch.stack(rows)
