"""Which modules must share a scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.modelspec import LinearSpec
    from advisor.search.families import Family

_EXPERTS = "all experts"


def tied_modules(
    linears: Sequence[LinearSpec], family: Family, *, experts_as_one: bool
) -> dict[str, list[LinearSpec]]:
    """Return the modules that must share a scheme, by a common key.

    Engines fuse some; under AWQ all that read one input share its scales.

    Args:
        linears: All that may be quantized.
        family: Says whether AWQ is among the methods.
        experts_as_one: Whether the engine unpacks all experts of all layers by one scheme.
    """
    fused: dict[str, set[str]] = {}
    for linear in linears:
        fused.setdefault(linear.input_group, set()).add(linear.fused_group)
    ties: dict[str, list[LinearSpec]] = {}
    for linear in linears:
        split = len(fused[linear.input_group]) > 1 and "awq" in family.methods
        key = linear.input_group if split else linear.fused_group
        if experts_as_one and linear.is_expert:
            key = _EXPERTS
        ties.setdefault(key, []).append(linear)
    return ties
