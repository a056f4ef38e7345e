"""The forward and the backward pass of a collection, block by block.

Memory holds one block in float32 with its gradients' intermediate values for ``BATCH_TOKENS``
tokens, the sums of that block (one moment for each input group, or for each output on the way
back), and between the passes the head with two copies of the logits of a few tokens
(:func:`advisor.models.blocks.head_tokens`). Hidden states and gradients between blocks lie in
memory-mapped files, one for each block as long as the backward pass may need them; of these, too,
memory holds one batch.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.end_passes import EndPasses
from advisor.calibration.settings import keeps_full_gradient, needed_bytes
from advisor.calibration.spill import Spill
from advisor.calibration.store import gradients_file, inputs_file
from advisor.calibration.tapes import GradientTape, InputTape
from advisor.errors import InputError
from advisor.models.allocator import drop_pages
from advisor.models.blocks import BlockRunner
from advisor.models.inspect import block_linears, outer_specs

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.settings import CollectionSettings
    from advisor.calibration.store import StatisticsStore
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
BATCH_TOKENS = 1024


class Collector:
    """One run over the blocks: forward for the inputs, backward for the gradients."""

    def __init__(
        self,
        loaded: LoadedModel,
        sequences: TokenSequences,
        store: StatisticsStore,
        settings: CollectionSettings,
        progress: Progress | None,
    ) -> None:
        """Plan the batches; nothing is run (see :func:`advisor.calibration.collect_statistics`)."""
        self.loaded = loaded
        self.tokens = sequences.tokens
        self.store = store
        self.settings = settings
        self.runner = BlockRunner(loaded.model)
        self.blocks = len(self.runner.blocks)
        config: Any = loaded.model.config
        self.hidden_size = int(config.hidden_size)
        self._outer = outer_specs(loaded.model)
        self._ends = EndPasses(loaded, self.runner, sequences.tokens, store, settings)
        self.batches = self._plan_batches()
        self._progress = progress
        self._done = 0

    @property
    def needed_bytes(self) -> int:
        """Disk that the collection needs at its peak."""
        return needed_bytes(
            self.loaded.linears, self.settings, self.tokens.numel(), self.hidden_size, self._outer
        )

    def check_disk(self, max_bytes: int | None) -> None:
        """Refuse before any work when the disk, or the limit given, is too small."""
        needed = self.needed_bytes
        logger.info("statistics need %.2f GB under %s", needed / 1e9, self.store.root)
        if max_bytes is not None and needed > max_bytes:
            raise InputError(
                f"statistics need {needed / 1e9:.2f} GB of disk, but at most "
                f"{max_bytes / 1e9:.2f} GB are allowed. Use fewer samples or prefixes, or "
                "gradient=diagonal."
            )
        free = free_bytes(self.store.root) + self.store.disk_bytes
        if needed > free:
            raise InputError(
                f"statistics need {needed / 1e9:.2f} GB under {self.store.root}, but "
                f"{free / 1e9:.2f} GB are free. Set ADVISOR_CACHE to a folder on another disk, or "
                "use fewer samples."
            )

    def run(self) -> None:
        """Collect what the store does not have yet."""
        gradients = self.settings.gradient != "none"
        self.store.begin(self.settings.facts(self.tokens.shape[1]))
        self._forward(gradients)
        if gradients:
            self._backward()
        self.store.finish()

    def _plan_batches(self) -> list[tuple[int, int, bool]]:
        """Return (first, past last, ends a prefix) of every batch."""
        size = max(1, BATCH_TOKENS // self.tokens.shape[1])
        batches = []
        first = 0
        for last in self.settings.prefixes:
            for start in range(first, last, size):
                stop = min(start + size, last)
                batches.append((start, stop, stop == last))
            first = last
        return batches

    def _spill(self, name: str) -> Spill:
        shape = (*self.tokens.shape, self.hidden_size)
        return Spill(self.store.work_folder, name, shape, self.loaded.dtype)

    def _hidden(self, block: int) -> Spill:
        return self._spill(f"hidden-{block:05d}")

    def _upstream(self, block: int) -> Spill:
        return self._spill(f"upstream-{block:05d}")

    def _advance(self, steps: int = 1) -> None:
        self._done += steps
        if self._progress is not None:
            phases = 1 if self.settings.gradient == "none" else 2
            self._progress(self._done, phases * self.blocks * len(self.batches))

    def _forward(self, keep_hidden: bool) -> None:
        """Run the blocks in order over all sequences and write the sums of their inputs."""
        first = 0
        while first < self.blocks and self.store.has(inputs_file(first)):
            first += 1
        done = self._can_resume_backward()
        kept = range(first + 1) if keep_hidden else [first]
        if done or (first and all(self._hidden(block).exists for block in kept)):
            first = self.blocks if done else first
            logger.info("resuming: %d of %d blocks have input moments", first, self.blocks)
            self._learn_arguments()
        else:
            first = 0
            states = self._hidden(0).create()
            with self.runner.at_embedding():
                for start, stop, _ in self.batches:
                    states[start:stop] = self._embed(start, stop).cpu()
                    drop_pages(states[start:stop])
            self._hidden(0).publish()
        self._advance(first * len(self.batches))
        for block in range(first, self.blocks):
            self._forward_block(block)
            if not keep_hidden:
                self._hidden(block).delete()

    def _embed(self, start: int, stop: int) -> Tensor:
        """Embed a batch, and so learn the blocks' arguments for its shape."""
        return self.runner.embed(self.tokens[start:stop].to(self.loaded.device))

    def _learn_arguments(self) -> None:
        """Embed one batch of every size."""
        examples = {stop - start: (start, stop) for start, stop, _ in self.batches}
        with self.runner.at_embedding():
            for start, stop in examples.values():
                self._embed(start, stop)

    def _forward_block(self, block: int) -> None:
        inputs, target = self._hidden(block).open(), self._hidden(block + 1)
        outputs = target.create()
        tensors: dict[str, Tensor] = {}
        prefix = 0
        linears = block_linears(self.loaded.linears, block)
        with (
            InputTape(
                self.loaded.model,
                linears,
                self.loaded.device,
                moments=self.settings.gradient == "none",
            ) as tape,  # fmt: skip
            self.runner.at_block(block),
            torch.no_grad(),
        ):
            for start, stop, ends_prefix in self.batches:
                hidden = inputs[start:stop].to(self.loaded.device)
                outputs[start:stop] = self.runner.run(block, hidden).cpu()
                drop_pages(inputs[start:stop], outputs[start:stop])
                if ends_prefix:
                    taken = tape.take()
                    tensors.update({f"{prefix}/{name}": value for name, value in taken.items()})
                    prefix += 1
                self._advance()
        target.publish()
        self.store.put(inputs_file(block), tensors)

    def _can_resume_backward(self) -> bool:
        """Whether the forward pass is done and what the backward pass needs is still there."""
        if self.settings.gradient == "none":
            return False
        if not all(self.store.has(inputs_file(block)) for block in range(self.blocks)):
            return False
        last = self._next_gradient_block()
        needed = [self._hidden(block) for block in range(last + 1)]
        top = self._hidden(self.blocks) if last == self.blocks - 1 else self._upstream(last + 1)
        return top.exists and all(spill.exists for spill in needed)

    def _next_gradient_block(self) -> int:
        """Return the last block without gradients; -1 when all have them."""
        block = self.blocks - 1
        while block >= 0 and self.store.has(gradients_file(block)):
            block -= 1
        return block

    def _backward(self) -> None:
        """Run the blocks last to first; write the moments of gradients and, weighted, of inputs."""
        last = self._next_gradient_block()
        self._advance((self.blocks - 1 - last) * len(self.batches))
        if not self._upstream(last + 1).exists:
            last = self.blocks - 1
            target = self._upstream(self.blocks)
            self._ends.run_head(self._hidden(self.blocks).open(), target.create())
            target.publish()
        for block in range(last, -1, -1):
            self._backward_block(block)
            self._upstream(block + 1).delete()
            self._hidden(block + 1).delete()
        if self._ends.wants_embedding(self.hidden_size):
            self._ends.sum_embedding(self._upstream(0).open())

    def _backward_block(self, block: int) -> None:
        inputs, upstream = self._hidden(block).open(), self._upstream(block + 1).open()
        target = self._upstream(block)
        downstream = target.create()
        tensors: dict[str, Tensor] = {}
        prefix = 0
        full = {
            linear.name: keeps_full_gradient(linear, self.settings.gradient)
            for linear in block_linears(self.loaded.linears, block)
        }
        linears = block_linears(self.loaded.linears, block)
        with (
            GradientTape(self.loaded.model, linears, full, self.loaded.device) as tape,
            self.runner.at_block(block),
        ):
            for start, stop, ends_prefix in self.batches:
                hidden = inputs[start:stop].to(self.loaded.device).requires_grad_(True)
                with torch.enable_grad():
                    output = self.runner.run(block, hidden)
                arriving = upstream[start:stop].to(self.loaded.device)
                (gradient,) = torch.autograd.grad(output, hidden, arriving)
                downstream[start:stop] = gradient.cpu()
                tape.end_batch()
                del output, gradient, hidden, arriving
                drop_pages(inputs[start:stop], upstream[start:stop], downstream[start:stop])
                if ends_prefix:
                    found = tape.take_inputs()
                    tensors.update({f"{prefix}/{name}": value for name, value in found.items()})
                    prefix += 1
                self._advance()
            tensors.update(tape.take())
        target.publish()
        self.store.put(gradients_file(block), tensors)


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free where a folder is, or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
