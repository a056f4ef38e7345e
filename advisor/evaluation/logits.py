"""Token log-probabilities of a model, a chunk of tokens at a time: vocabularies are large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from advisor.models.inspect import architecture_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

CHUNK_TOKENS = 256


def iterate_log_probabilities(model: nn.Module, tokens: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the log-probabilities of every next token of one sequence.

    Args:
        model: A loaded model of a known architecture.
        tokens: int64 [length].

    Yields:
        (position of the first row, float32 [rows, vocabulary]); the rows together predict
        ``tokens[1:]``. Each chunk belongs to the caller.
    """
    architecture = architecture_of(model)
    base = model.get_submodule(architecture.blocks.split(".")[0])
    head = model.get_submodule(architecture.head)
    config: Any = model.config
    softcap = getattr(config, "final_logit_softcapping", None)
    device = next(model.parameters()).device
    with torch.no_grad():
        output = base(input_ids=tokens[None].to(device), use_cache=False)
        hidden = output.last_hidden_state[0, :-1]
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            logits = head(hidden[start : start + CHUNK_TOKENS]).to(torch.float32)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            yield start, torch.log_softmax(logits, dim=-1)
