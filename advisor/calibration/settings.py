"""Settings of a collection, and what it needs on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.moments import packed_length
from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec

GRADIENT_KINDS = ("full", "diagonal", "none")
FULL_GRADIENT_LIMIT = 4096
"""Outputs above which ``full`` keeps the diagonal: the moment would outgrow the weight."""
SMALLEST_PREFIX = 8


@dataclass(frozen=True, slots=True)
class CollectionSettings:
    """Everything beside weights and tokens that changes the sums.

    Attributes:
        prefixes: Sample counts whose sums are kept, ascending; the last is all.
        gradient: ``full`` (diagonal above 4096 outputs), ``diagonal`` or ``none``.
        seed: Seed of the signs that outputs send back (:mod:`advisor.calibration.fisher`).
        dtype: Data type that the model computes in.
        compact: Whether moments of inputs are kept in 16 bits
            (:func:`advisor.calibration.moments.compacted`).
    """

    prefixes: tuple[int, ...]
    gradient: str
    seed: int
    dtype: str
    compact: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as they enter the store's key."""
        content: dict[str, Any] = {
            "prefixes": list(self.prefixes),
            "gradient": self.gradient,
            "seed": self.seed if self.gradient != "none" else None,
            "dtype": self.dtype,
        }
        return content | ({"compact": True} if self.compact else {})

    def facts(self, sequence_length: int) -> dict[str, Any]:
        """Return what a store remembers of a collection over sequences of that many tokens."""
        tokens = [count * sequence_length for count in self.prefixes]
        return {
            "settings": self.to_dict(),
            "prefixes": list(self.prefixes),
            "tokens": tokens,
            "gradient_tokens": 0 if self.gradient == "none" else tokens[-1],
        }


def default_prefixes(sequences: int, *, compact: bool = False) -> tuple[int, ...]:
    """Return those of 8, 16, 32, ... that are a quarter of the sequences or more, and all of them.

    A search takes no smaller part, and each takes the room of a whole H on disk. Where that is
    short, the largest part that is not above half is kept, which scores are fitted to, and all.
    """
    prefixes = []
    count = SMALLEST_PREFIX
    while count < sequences:
        if 4 * count >= sequences:
            prefixes.append(count)
        count *= 2
    if compact:
        prefixes = [count for count in prefixes if 2 * count <= sequences][-1:]
    return (*prefixes, sequences)


def collection_settings(
    loaded: LoadedModel,
    sequences: TokenSequences,
    *,
    gradient: str = "full",
    prefixes: Sequence[int] | None = None,
    seed: int = 0,
    compact: bool = False,
) -> CollectionSettings:
    """Check and complete the settings of a collection.

    Raises:
        InputError: An unknown kind of gradient, or a prefix that the sequences do not have.
    """
    if gradient not in GRADIENT_KINDS:
        raise InputError(f"gradient must be one of {', '.join(GRADIENT_KINDS)}, got {gradient!r}.")
    total = sequences.sequences
    usual = default_prefixes(total, compact=compact)
    chosen = sorted(set(usual if prefixes is None else prefixes))
    wrong = [count for count in chosen if not 1 <= count <= total]
    if wrong:
        raise InputError(f"sample prefixes must be between 1 and {total}, but got {wrong}.")
    if not chosen or chosen[-1] != total:
        chosen.append(total)
    return CollectionSettings(
        prefixes=tuple(chosen),
        gradient=gradient,
        seed=seed,
        dtype=str(loaded.dtype).removeprefix("torch."),
        compact=compact,
    )


def kept_bytes(
    linears: Sequence[LinearSpec],
    settings: CollectionSettings,
    tokens: int,
    outer: Sequence[LinearSpec] = (),
) -> int:
    """Return the bytes that finished statistics take on disk, headers not counted.

    Args:
        linears: Every linear of the model.
        settings: Of the collection.
        tokens: Calibration tokens.
        outer: Head and embedding, as their statistics are kept.
    """
    groups = {linear.input_group: linear.in_features for linear in linears}
    total = sum(_input_bytes(size, settings) for size in groups.values())
    if settings.gradient == "none":
        return total
    total += 4 * tokens * len(groups)  # every token's weight
    for linear in linears:
        full = keeps_full_gradient(linear, settings.gradient)
        total += 4 * (packed_length(linear.out_features) if full else linear.out_features)
    for linear in outer:
        total += _input_bytes(linear.in_features, settings) + 4 * linear.out_features
    return total + (4 * tokens if outer else 0)


def _input_bytes(size: int, settings: CollectionSettings) -> int:
    """Return the bytes of the sums of an input: of each prefix H, maxima and sums."""
    moment = 2 * packed_length(size) + 4 * size if settings.compact else 4 * packed_length(size)
    return (moment + 8 * size) * len(settings.prefixes)


def needed_bytes(
    linears: Sequence[LinearSpec],
    settings: CollectionSettings,
    tokens: int,
    hidden_size: int,
    outer: Sequence[LinearSpec] = (),
) -> int:
    """Return the bytes that a collection needs on disk at its peak, headers not counted.

    Args:
        linears: Every linear of the model.
        settings: Of the collection.
        tokens: Calibration tokens.
        hidden_size: Width of the hidden states between blocks.
        outer: Head and embedding, as their statistics are kept.
    """
    blocks = len({linear.block for linear in linears})
    states = tokens * hidden_size * dtype_bytes(settings.dtype)
    kept = kept_bytes(linears, settings, tokens, outer)
    if settings.gradient == "none":
        return kept + 2 * states
    # The forward pass keeps every block's states and writes little; the backward pass writes the
    # moments and drops states as it goes.
    groups = {linear.input_group: linear.in_features for linear in linears}
    sums = sum(8 * size for size in groups.values()) * len(settings.prefixes)
    return max(sums + (blocks + 3) * states, kept + 3 * states)


def dtype_bytes(name: str) -> int:
    """Return the bytes of one value of a torch data type."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize


def keeps_full_gradient(linear: LinearSpec, gradient: str) -> bool:
    """Whether a linear's gradient moment is a matrix, or only its diagonal.

    Experts of a mixture are many and each sees few tokens: their matrices would be large and noisy.
    """
    small = linear.out_features <= FULL_GRADIENT_LIMIT and not linear.is_expert
    return gradient == "full" and small
