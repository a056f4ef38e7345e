"""What writing token by token needs: room for keys and values, and attention of single queries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import Tensor


def roomy_cache(length: int) -> Any:
    """Return room for the keys and values of so many tokens of some sequences, and for more.

    transformers' own makes new tensors, a little larger, for every token and block. While 32×256
    tokens of SmolLM2-135M were written, whose keys and values take 190 MB, the process grew by 700
    MB with it, and by 505 MB with this.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """The keys and values of one block: views of the filled part of larger tensors."""

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(keys, values)
                self.keys, self.values = self._room = keys[:, :, :0], values[:, :, :0]
            start = self.keys.shape[2]
            stop = start + keys.shape[2]
            if stop > self._room[0].shape[2]:
                wanted = max(length, 2 * start, stop)
                self._room = (_larger(self.keys, wanted), _larger(self.values, wanted))
            for room, new in zip(self._room, (keys, values), strict=True):
                room[:, :, start:stop] = new
            self.keys, self.values = (room[:, :, :stop] for room in self._room)
            return self.keys, self.values

    return Cache(layer_class_to_replicate=RoomyLayer)


def _larger(old: Tensor, length: int) -> Tensor:
    """Return a tensor with room for more tokens, [batch, heads, length, width]."""
    new = old.new_empty(*old.shape[:2], length, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new


class OneQuery(TorchFunctionMode):
    """Computes attention of single queries on the host as two products of matrices.

    The queries that share keys are the rows of one matrix. torch's kernel for whole sequences takes
    15 times as long for that (32 sequences of 128 tokens, 9 heads on 3 groups of keys, bfloat16,
    one core with AVX-512).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, attention of single queries in the other way."""
        named = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3:
            query, key, value = args
            plain = named.get("attn_mask") is None and not named.get("is_causal")
            if plain and query.shape[2] == 1 and query.device.type == "cpu":
                return attend(query, key, value, named.get("scale"))
        return func(*args, **named)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Return the attention of one query a head to all keys, [batch, heads, 1, width].

    Args:
        query: [batch, heads, 1, width].
        key: [batch, groups, length, width]; consecutive heads share a group.
        value: [batch, groups, length, any width].
        scale: Factor of the scores; by default the inverse root of the width.
    """
    batch, heads, _, width = query.shape
    groups = key.shape[1]
    shared = query.reshape(batch, groups, heads // groups, width)
    scores = shared @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    found = torch.softmax(scores, dim=-1) @ value
    return found.reshape(batch, heads, 1, value.shape[-1])
