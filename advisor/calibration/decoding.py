"""What writing token by token needs: room for keys and values, and attention of single queries.

On the host keys and values lie in pieces of some tokens each. A piece that was filled never moves,
so it may lie in a file that a killed run leaves behind, and of which memory holds the block alone
that computes; and however many tokens there are, products have few shapes. oneDNN makes code for
every shape of a product of 16-bit numbers, about half a megabyte, and keeps it, and it copies what
is a view of something larger. Where keys and values were views that grew by every token, the
process grew by 630 MB while 32×256 tokens of SmolLM2-135M were written, 190 MB of which were keys
and values; it grows by 130 MB so, 57 MB of which are the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from advisor.models.allocator import drop_pages

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PIECE = 64
"""Tokens of a piece."""


def room_for(length: int) -> int:
    """Return for how many tokens there is room where there must be for some: whole pieces."""
    return -(-length // PIECE) * PIECE


class Pieces(torch.Tensor):
    """Keys or values, [batch, groups, length, width], that lie in pieces of tokens.

    Attention of single queries works on the pieces; anything else joins them in a new tensor first.

    Attributes:
        room: [pieces, batch, groups, tokens of a piece, width], contiguous; whatever is finite
            after the last token.
        length: Tokens.
    """

    room: Tensor
    length: int

    @staticmethod
    def __new__(cls, room: Tensor, length: int) -> Pieces:
        """Name what lies in pieces one tensor; nothing is copied."""
        _, batch, groups, _, width = room.shape
        found: Pieces = torch.Tensor._make_wrapper_subclass(
            cls, (batch, groups, length, width), dtype=room.dtype, device=room.device
        )
        found.room, found.length = room, length
        return found

    def joined(self) -> Tensor:
        """Return a plain tensor of the same values."""
        return self.room.movedim(0, 2).flatten(2, 3)[:, :, : self.length]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation: attention of single queries on the pieces."""
        named = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and len(args) == 3:
            query, key, value = args
            plain = named.get("attn_mask") is None and not named.get("is_causal")
            if plain and query.shape[2] == 1 and all(isinstance(x, cls) for x in (key, value)):
                return attend(query, key, value, named.get("scale"))
        kind = torch.Tensor
        if func in (kind.shape.__get__, kind.dtype.__get__, kind.device.__get__):  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():  # what is said of it needs no joining
                return func(*args, **named)
        return func(*tree_map(_plain, args), **tree_map(_plain, named))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run what is called from within torch on joined tensors."""
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs or {}))


def _plain(value: Any) -> Any:
    return value.joined() if isinstance(value, Pieces) else value


def attend(query: Tensor, key: Pieces, value: Pieces, scale: float | None = None) -> Tensor:
    """Return the attention of one query a head to all keys, [batch, heads, 1, width].

    The queries that share keys are the rows of one matrix, and all pieces are multiplied at once.
    torch's kernel for whole sequences takes 15 times as long for that (32 sequences of 128 tokens,
    9 heads on 3 groups of keys, bfloat16, one core with AVX-512).

    Args:
        query: [batch, heads, 1, width].
        key: [batch, groups, length, width]; consecutive heads share a group.
        value: [batch, groups, length, any width].
        scale: Factor of the scores; by default the inverse root of the width.
    """
    batch, heads, _, width = query.shape
    pieces, _, groups, size, _ = key.room.shape
    shared = query.reshape(batch, groups, heads // groups, width)
    scores = (shared @ key.room.transpose(-1, -2)).movedim(0, 3).flatten(3)
    scores = scores * (width**-0.5 if scale is None else scale)
    scores[..., key.length :] = -torch.inf
    shares = torch.softmax(scores, dim=-1).view(*scores.shape[:3], pieces, size).movedim(3, 0)
    found: Tensor = (shares @ value.room).sum(0, dtype=torch.float32).to(query.dtype)
    return found.reshape(batch, heads, 1, value.room.shape[-1])


def pieced_cache(
    blocks: int,
    length: int,
    *,
    room_of: Callable[[str, tuple[int, ...], Tensor], Tensor] | None = None,
    filled: int = 0,
) -> Any:
    """Return room for the keys and values of so many tokens of some sequences.

    Args:
        blocks: Of the model.
        length: Tokens that there must be room for.
        room_of: Gives room by a name and a shape, for tokens like some: on the host mapped from a
            file, so that memory holds the pages of one block at a time.
        filled: Tokens whose keys and values are in that room already.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    most = room_for(length) // PIECE
    mapped: list[list[Tensor]] = [[]]
    """What the block before this one used."""

    class PieceLayer(DynamicLayer):  # type: ignore[misc]
        """The keys and values of one block."""

        def __init__(self, block: int) -> None:
            super().__init__()
            self.block, self.length = block, filled
            self.rooms: tuple[Tensor, Tensor] | None = None

        def get_seq_length(self) -> int:
            return self.length

        def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            start, stop = self.length, self.length + keys.shape[2]
            if self.rooms is None:
                self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
                self.rooms = (self._room("keys", keys), self._room("values", values))
            for room, new in zip(self.rooms, (keys, values), strict=True):
                _fill(room, start, new)
            self.length = stop
            used = -(-stop // PIECE)
            if room_of is not None:
                drop_pages(*mapped[0])
                mapped[0] = [room[:used] for room in self.rooms]
            self.keys, self.values = (Pieces(room[:used], stop) for room in self.rooms)
            return self.keys, self.values

        def _room(self, kind: str, new: Tensor) -> Tensor:
            batch, groups, _, width = new.shape
            shape = (most, batch, groups, PIECE, width)
            if room_of is None:
                return new.new_empty(shape)
            return room_of(f"{self.block:05d}-{kind}", shape, new)

    return Cache(layers=[PieceLayer(block) for block in range(blocks)])


def _fill(room: Tensor, start: int, new: Tensor) -> None:
    """Write the keys or values of further tokens; a piece that is begun is cleared."""
    stop = start + new.shape[2]
    for piece in range(start // PIECE, -(-stop // PIECE)):
        first = piece * PIECE
        begin, end = max(start, first), min(stop, first + PIECE)
        if begin == first:
            room[piece].zero_()
        room[piece, :, :, begin - first : end - first] = new[:, :, begin - start : end - start]


def filled_slots(room: Tensor, start: int, stop: int) -> list[Tensor]:
    """Return views of what some tokens' keys or values take of their room, in order."""
    return [
        room[first // PIECE, :, :, max(start, first) - first : min(stop, first + PIECE) - first]
        for first in range(start // PIECE * PIECE, stop, PIECE)
    ]
