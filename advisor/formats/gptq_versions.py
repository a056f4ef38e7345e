"""The two versions of GPTQ checkpoints, which differ in how zero points are stored.

``gptq`` (v1, what auto-gptq wrote, also where ``checkpoint_format`` is absent) stores them minus
one; since 0 - 1 does not fit, ``gptq_v2`` stores them as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from advisor.numerics.quantized_weight import QuantizedWeight

V1, V2 = "gptq", "gptq_v2"


def version_for(weights: Iterable[QuantizedWeight]) -> str:
    """Return the version that holds these weights: v1, unless a zero point is 0."""
    zero = any(
        weight.zero_points is not None and bool((weight.zero_points == 0).any())
        for weight in weights
    )
    return V2 if zero else V1


def stored_zero_points(zero_points: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return zero points as the configuration's version stores them."""
    return zero_points - 1 if config["checkpoint_format"] == V1 else zero_points


def true_zero_points(stored: Tensor, bits: int, config: Mapping[str, Any]) -> Tensor:
    """Return the zero points that stored ones stand for, as auto-gptq reads them: modulo 2^bits."""
    if config.get("checkpoint_format", V1) != V1:
        return stored
    mask = int(2**bits - 1)
    return (stored + 1) & mask


def zeros_in_words(zero_points: Tensor, bits: int, config: Mapping[str, Any]) -> str:
    """Say what is wrong with the zero points of a module that should be symmetric."""
    middle = 2 ** (bits - 1)
    said = config.get("checkpoint_format", f"{V1} (by default)")
    text = f"config.json says sym, but qzeros are not all {middle}"
    if bool((zero_points == middle + 1).all()):
        return (
            f"{text}: each is one too high. They are stored as in gptq_v2, config.json says "
            f"checkpoint_format {said}."
        )
    if bool((zero_points == middle - 1).all()):
        return (
            f"{text}: each is one too low. They are stored as in gptq (v1, minus one), config.json "
            f"says checkpoint_format {said}."
        )
    return f"{text}."
