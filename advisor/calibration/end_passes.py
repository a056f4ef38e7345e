"""The two ends of a backward pass: from the loss through the head, and into the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.calibration.fisher import loss_gradients, sign_source
from advisor.calibration.outer import EmbeddingSums, HeadSums
from advisor.calibration.store import gradients_file, inputs_file
from advisor.models.allocator import drop_pages
from advisor.models.blocks import head_tokens, rows_at_once
from advisor.models.inspect import outer_specs

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.settings import CollectionSettings
    from advisor.calibration.store import StatisticsStore
    from advisor.models.blocks import BlockRunner
    from advisor.models.load import LoadedModel


class EndPasses:
    """Runs the head forward and backward, and sums what arrives at the embedding."""

    def __init__(
        self,
        loaded: LoadedModel,
        runner: BlockRunner,
        tokens: Tensor,
        store: StatisticsStore,
        settings: CollectionSettings,
    ) -> None:
        """Prepare.

        Args:
            loaded: The unquantized model.
            runner: Of its blocks.
            tokens: The calibration sequences, int64 [sequences, length].
            store: Where the sums go.
            settings: Prefixes and the seed of the signs.
        """
        self._device = loaded.device
        self._runner = runner
        self._tokens = tokens
        self._store = store
        self._settings = settings
        self._head, self._embedding = outer_specs(loaded.model)

    def run_head(self, states: Tensor, gradients: Tensor) -> None:
        """Write the gradient of the summed log-loss at the last block's output, and the head's.

        Args:
            states: The last block's outputs, [sequences, length, hidden], on disk.
            gradients: Shaped alike, on disk; written.
        """
        tokens = head_tokens(self._runner.vocabulary, self._device) // 2  # as there are two of them
        sums = HeadSums(self._head, self._device)
        with self._runner.at_head():
            for index in range(len(states)):
                source = sign_source(self._tokens[index], self._settings.seed)
                for start in range(0, states.shape[1], tokens):
                    part = slice(start, start + tokens)
                    hidden = states[index, part].to(self._device)
                    gradients[index, part] = self._token_gradients(hidden, source, sums).cpu()
                drop_pages(states[index], gradients[index])
                if index + 1 in self._settings.prefixes:
                    sums.end_prefix()
        sums.finish()
        self._store.put(inputs_file(self._head.block), sums.inputs)
        self._store.put(gradients_file(self._head.block), sums.gradients)

    def wants_embedding(self, hidden_size: int) -> bool:
        """Whether the embedding's sums are still to be made, and can be: it gives the stream."""
        spec = self._embedding
        return spec.in_features == hidden_size and not self._store.has(gradients_file(spec.block))

    def sum_embedding(self, upstream: Tensor) -> None:
        """Write what the gradients at the first block's input say of the embedding.

        Args:
            upstream: They, [sequences, length, hidden], on disk.
        """
        spec = self._embedding
        sums = EmbeddingSums(spec, self._device)
        for index in range(len(upstream)):
            sums.add(self._tokens[index].cpu(), upstream[index].to(self._device))
            if index + 1 in self._settings.prefixes:
                sums.end_prefix()
        sums.finish()
        self._store.put(inputs_file(spec.block), sums.inputs)
        self._store.put(gradients_file(spec.block), sums.gradients)

    def _token_gradients(self, hidden: Tensor, source: torch.Generator, sums: HeadSums) -> Tensor:
        """Return what tokens send back from the logits (:mod:`advisor.calibration.fisher`)."""
        hidden = hidden.detach().requires_grad_(True)
        seen: list[tuple[Tensor, Tensor]] = []

        def watch(_module: object, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            seen.append((arguments[0].detach(), output))

        handle = self._runner.head_module.register_forward_hook(watch)
        try:
            with torch.enable_grad():
                logits = self._runner.head(hidden[None])
        finally:
            handle.remove()
        residual = torch.empty_like(logits)
        rows = rows_at_once(logits.shape[-1], logits.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            residual[0, part] = loss_gradients(logits[0, part].detach().float(), source)
        read, output = seen[0]
        gradient, behind = torch.autograd.grad(logits, (hidden, output), residual)
        sums.add(read.reshape(-1, read.shape[-1]), behind.reshape(-1, behind.shape[-1]))
        return gradient
