"""The matrices at a decoder's ends, embedding and head, as modules that can be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from advisor.modelspec.types import LinearSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.modelspec.types import ModelSpec

OuterRole = Literal["head", "embedding"]


@dataclass(frozen=True, slots=True)
class OuterModule:
    """An embedding or a head.

    Attributes:
        role: ``embedding`` also where it is the head too.
        linear: Name and shape; rows are tokens of the vocabulary.
        tied: Whether it is both.
    """

    role: OuterRole
    linear: LinearSpec
    tied: bool

    @property
    def name(self) -> str:
        """Module path."""
        return self.linear.name


def outer_modules(
    spec: ModelSpec, *, head: bool = True, embedding: bool = True
) -> tuple[OuterModule, ...]:
    """Return the embedding and the head of a model; one module where they are one tensor.

    Args:
        spec: The model.
        head: Whether the head is wanted.
        embedding: Whether the embedding is.
    """
    found: list[OuterModule] = []
    wanted: Mapping[str, bool] = {"embedding": embedding, "head": head}
    for tensor in spec.unquantized_tensors:
        if tensor.role not in ("embedding", "head") or len(tensor.shape) != 2:
            continue
        if any(module.role == tensor.role for module in found):
            continue  # a table of positions
        tied = tensor.role == "embedding" and spec.tied_embeddings
        if wanted[tensor.role] or (tied and head):
            name = tensor.name.removesuffix(".weight")
            rows, width = tensor.shape
            linear = LinearSpec(name, width, rows, spec.blocks, name, name)
            role: OuterRole = "embedding" if tensor.role == "embedding" else "head"
            found.append(OuterModule(role, linear, tied))
    return tuple(found)


def outer_statistics_specs(
    blocks: int, vocabulary: int, width: int
) -> tuple[LinearSpec, LinearSpec]:
    """Return under which names the statistics of the head and of the embedding are kept.

    They lie beside those of the blocks, as if two more blocks came after the last.

    Args:
        blocks: Number of blocks.
        vocabulary: Rows of head and embedding.
        width: Their columns.
    """
    return (
        LinearSpec("head", width, vocabulary, blocks, "head", "head"),
        LinearSpec("embedding", width, vocabulary, blocks + 1, "embedding", "embedding"),
    )
