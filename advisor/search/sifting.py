"""Which methods are not worth scoring: a look at every sixth block tells.

Scoring every method is a fifth of a search, and most of that goes to methods that are nowhere near
the best one.
So every method's usual family is scored on evenly spaced blocks first, and a method whose KL is far
from the best one's in all storages goes no further: no trial asks for it.

Measured on SmolLM2-135M (32×256 calibration tokens, five storages of int4 and two of int8, on five
of its 30 blocks and on all): AWQ has 1.9 to 2.6 times the KL of GPTQ on the sample and 1.8 to 3.6
times on all of them, rounding 3.0 to 3.6 times and 3.6 to 4.6 times.

The same look, a sixth of the cost, comes before each further family that a trial asks for, and
hardly ever is there more to it. There (integers of 2 to 8 bits in groups of 32 and 64 and per
channel, ranges not searched), over GPTQ in order of activation at damping 0.15: damping 0.05 has
1.01 to 1.03 times its KL, 0.5 has 1.05 to 1.07 times, columns in their own order 1.18 to 1.30.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.search.families import BEST
from advisor.search.space import kernel_view

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from advisor.modelspec import LinearSpec
    from advisor.search.compose import Composer
    from advisor.search.families import Family
    from advisor.search.space import Space

FAR_BEHIND = 1.5
"""Times the best method's KL, where a method comes nearest to it."""
PROMISING = 0.97
"""Times the least KL known, from where a family is worth scoring on all blocks."""
_EVERY, _FEWEST = 6, 2
"""Of so many blocks one is looked at, and of at least two."""


def sample_of(linears: Sequence[LinearSpec]) -> tuple[int, ...]:
    """Return the blocks that are looked at, evenly spaced; none of a shallow model."""
    blocks = sorted({linear.block for linear in linears})
    found = tuple(blocks[_EVERY // 2 :: _EVERY])
    return found if len(found) >= _FEWEST else ()


def methods_far_behind(
    composer: Composer, families: Sequence[Family], progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """Return the methods that are not worth scoring, with the reason in words.

    Args:
        composer: Knows the scores.
        families: The usual one of each method. ``best`` is behind where all but one of the methods
            that it chooses from are.
        progress: Called with (input groups done, in all).
    """
    alone = [family for family in families if family.method != BEST]
    sample = sample_of(composer.linears)
    if len(alone) < 2 or not sample:
        return {}
    # GPTQ's settings say most: rounding and AWQ heed a part of them.
    alone.sort(key=lambda family: family.method != "gptq")
    composer.score_together(alone, progress, sampled=True)
    found = {family.method: _by_storage(composer, family) for family in alone}
    blocks = len({linear.block for linear in composer.linears})
    where = f"on {len(sample)} of {blocks} blocks"
    reasons = {
        method: f"{method} has {times:.1f} times the least KL or more, {where}"
        for method, times in times_the_least(found).items()
        if times >= FAR_BEHIND
    }
    if len(reasons) == len(alone) - 1:
        best = next(method for method in found if method not in reasons)
        reasons[BEST] = f"no other method comes near {best}, {where}"
    return reasons


def share_of_a_look(composer: Composer) -> float:
    """Return what a look at the sample costs of scoring all; 0 where there is no sample."""
    blocks = len({linear.block for linear in composer.linears})
    return len(sample_of(composer.linears)) / blocks


def is_promising(
    composer: Composer,
    family: Family,
    known: Sequence[Family],
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Whether a family's KL on the sample is clearly below all known ones', in any storage.

    Args:
        composer: Knows the scores.
        family: Not scored yet, of one method.
        known: Scored ones.
        progress: Called with (input groups done, in all).
    """
    composer.score_together([family], progress, sampled=True)
    others = [_by_storage(composer, other) for other in known if other.method != BEST]
    return any(
        kl <= PROMISING * min((other.get(storage, math.inf) for other in others), default=math.inf)
        for storage, kl in _by_storage(composer, family).items()
    )


def without(space: Space, methods: Collection[str]) -> Space:
    """Return a space without some of its methods."""
    return replace(space, methods=tuple(m for m in space.methods if m not in methods))


def times_the_least(found: Mapping[str, Mapping[object, float]]) -> dict[str, float]:
    """Return how many times the least KL each method has, of the storage where it is nearest to it.

    Args:
        found: By method and storage, KL.
    """
    least: dict[object, float] = {}
    for own in found.values():
        for storage, kl in own.items():
            least[storage] = min(kl, least.get(storage, kl))
    return {
        method: min((kl / max(least[storage], 1e-30) for storage, kl in own.items()), default=1.0)
        for method, own in found.items()
    }


def _by_storage(composer: Composer, family: Family) -> dict[object, float]:
    """Return the KL that a family's integers predict for the sample, by storage.

    Storages that do not fit all modules are left out: few modules say little.
    """
    schemes = [s for s in composer.schemes(family) if s.method == family.method and s.is_integer]
    scores = composer.book.scores(
        schemes, family.settings(composer.settings), family.samples, sampled=True
    )
    most = max((len(own) for own in scores.values()), default=0)
    return {
        kernel_view(scheme): sum(score.kl for score in own.values())
        for scheme, own in scores.items()
        if own and len(own) == most
    }
