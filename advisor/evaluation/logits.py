"""Token log-probabilities of a model, block after block over many sequences.

Memory holds one block in float32 (:mod:`advisor.models.casting`), then the head, the hidden
states of at most ``GROUP_TOKENS`` tokens, the logits of those that go through the head at once
(:func:`advisor.models.blocks.head_tokens`) and the log-probabilities of a few: vocabularies are
large. Each sequence runs through a block by itself,
as it would alone, so results do not depend on which sequences run together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.models.blocks import BlockRunner, head_tokens, rows_at_once
from advisor.models.casting import casting_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

GROUP_TOKENS = 8192
"""Tokens that go through a block before the next one is cast: enough to make casting and
dequantizing a small part of the time."""


def iterate_log_probabilities(
    model: nn.Module,
    sequences: Sequence[Tensor],
    step: Callable[[int, int], None] | None = None,
    group_tokens: int = GROUP_TOKENS,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the log-probabilities of every next token of some sequences, in their order.

    Args:
        model: A loaded model of a known architecture.
        sequences: Each int64 [length], at least 2 long; lengths may differ.
        step: Called with (sequences' worth of work done, sequences in all).
        group_tokens: Tokens that run through a block together, at most; fewer where the caller
            may stop early.

    Yields:
        (sequence, position of the first row, float32 [rows, vocabulary], where the model computes);
        the rows of a sequence together predict all its tokens but the first. Each chunk belongs to
        the caller.
    """
    runner = BlockRunner(model)
    device = casting_of(model).device
    passes = len(runner.blocks) + 1
    done = 0

    def advance(steps: int) -> None:
        nonlocal done
        done += steps
        if step is not None:
            step(done // passes, len(sequences))

    for first, last in _groups(sequences, group_tokens):
        hidden = []
        with torch.no_grad():
            with runner.at_embedding():
                for tokens in sequences[first:last]:
                    hidden.append(runner.embed(tokens[None].to(device)))
            for block in range(len(runner.blocks)):
                with runner.at_block(block):
                    for place, states in enumerate(hidden):
                        hidden[place] = runner.run(block, states)
                advance(last - first)
            runner.forget()
            with runner.at_head():
                for place in range(last - first):
                    for start, values in _chunks(runner, hidden[place][0, :-1]):
                        yield first + place, start, values
                    advance(1)


def _groups(sequences: Sequence[Tensor], most: int) -> Iterator[tuple[int, int]]:
    """Cut sequences into runs of at most that many tokens, or of one."""
    first = total = 0
    for index, tokens in enumerate(sequences):
        if index > first and total + len(tokens) > most:
            yield first, index
            first, total = index, 0
        total += len(tokens)
    if first < len(sequences):
        yield first, len(sequences)


def _chunks(runner: BlockRunner, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row and the log-probabilities of a few tokens at a time."""
    tokens = head_tokens(runner.vocabulary, runner.device)
    for start in range(0, len(hidden), tokens):
        logits = runner.head(hidden[start : start + tokens]).to(torch.float32)
        rows = rows_at_once(logits.shape[1], logits.device)
        for row in range(0, len(logits), rows):
            yield start + row, torch.log_softmax(logits[row : row + rows], dim=-1)
        del logits  # before the next ones are computed
