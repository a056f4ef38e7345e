"""Checkpoints as models: 16-bit folders and quantized ones, opened alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.numerics.quantized_weight import QuantizedWeight


def contents(
    checkpoint: Checkpoint, loaded: LoadedModel
) -> tuple[dict[str, QuantizedWeight], dict[str, Tensor]]:
    """Return a checkpoint's codes, and its 16-bit tensors that differ from the loaded model's.

    Args:
        checkpoint: What was read.
        loaded: The model whose place its weights take.
    """
    weights = {name: checkpoint.weight(name) for name in checkpoint.modules}
    tensors = dict(loaded.model.state_dict())
    replaced = {
        name: tensor.to(loaded.dtype)
        for name, tensor in checkpoint.other_tensors()
        if name in tensors and not torch.equal(tensor.to(loaded.dtype), tensors[name])
    }
    return weights, replaced
