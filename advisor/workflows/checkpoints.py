"""Checkpoints as models: 16-bit folders and quantized ones, opened alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.numerics.quantized_weight import QuantizedWeight


class CheckpointWeights(Mapping[str, "QuantizedWeight"]):
    """A checkpoint's codes by module, each read when it is asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Name the checkpoint; nothing is read."""
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read one module's codes."""
        if name not in self._checkpoint.modules:
            raise KeyError(name)
        return self._checkpoint.weight(name)

    def __iter__(self) -> Iterator[str]:
        """Go over the modules' names."""
        return iter(self._checkpoint.modules)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self._checkpoint.modules)


def contents(
    checkpoint: Checkpoint, loaded: LoadedModel
) -> tuple[Mapping[str, QuantizedWeight], dict[str, Tensor]]:
    """Return a checkpoint's codes, and its 16-bit tensors that differ from the loaded model's.

    Args:
        checkpoint: What was read.
        loaded: The model whose place its weights take.
    """
    names = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    replaced = {}
    for name, tensor in checkpoint.other_tensors():
        if name in names:
            stored = tensor.to(loaded.dtype)
            if not torch.equal(stored, loaded.tensor(name)):
                replaced[name] = stored
    return CheckpointWeights(checkpoint), replaced
