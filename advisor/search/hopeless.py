"""What scores say is not worth a measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.search.compose import Composer
    from advisor.search.families import Family
    from advisor.search.mixture import Mixture

FAR_BEHIND = 2.0
"""Scores of one method err by up to 1.5 times more than another's (see ``scores``): a candidate
whose score is this many times the best one's is not measured."""
_ALIKE = 0.4
"""Share of the modules whose schemes, method and all, two mixtures have in common: from there on a
second method's mixture says little that the first one's measurement does not. Integers of two
methods are never alike; NVFP4 and the like are the same beside any."""


def known_kl(composer: Composer, mixture: Mixture) -> float | None:
    """Return the KL that known scores predict for a candidate that was proposed without.

    NVFP4 and MXFP4, as uniform candidates, are of no family, but options of every mixture.

    Returns:
        None where a module has no score yet, or embedding and head take part.
    """
    settings, samples = mixture.family.settings(composer.settings), mixture.family.samples
    schemes = tuple(dict.fromkeys(mixture.assignment.values()))
    if composer.outer or composer.book.missing(schemes, settings, samples):
        return None
    scores = composer.book.scores(schemes, settings, samples)
    found = mixture.assignment.items()
    if any(name not in scores[scheme] for name, scheme in found):
        return None
    return sum(scores[scheme][name].kl for name, scheme in found)


def best_by_score(
    composer: Composer,
    candidates: Sequence[Mixture],
    scaled: Callable[[Family, float], float],
) -> Mixture | None:
    """Return the candidate of least predicted KL; one without a score only where none has any.

    Args:
        composer: Knows the scores.
        candidates: Scored ones, and some that were proposed without, least published loss first.
        scaled: Corrects a predicted KL by what measuring has shown of its family's scores.
    """
    known: list[tuple[float, int, Mixture]] = []
    for order, mixture in enumerate(candidates):
        predicted = mixture.predicted_kl or known_kl(composer, mixture)
        if predicted is not None:
            known.append((scaled(mixture.family, predicted), order, mixture))
    if known:
        return min(known)[2]
    return next(iter(candidates), None)


def not_far_behind(mixtures: Sequence[Mixture], leaders: Sequence[Mixture]) -> list[Mixture]:
    """Return the mixtures whose scores come near the leaders', and that are not much like them."""
    least = min((mixture.predicted_kl for mixture in leaders), default=0.0)
    near = [mixture for mixture in mixtures if mixture.predicted_kl <= FAR_BEHIND * least]
    return [m for m in near if all(m is first or not _are_alike(m, first) for first in leaders)]


def _are_alike(one: Mixture, other: Mixture) -> bool:
    """Whether many modules have the same scheme in both."""
    same = [
        name
        for name, scheme in one.assignment.items()
        if scheme.is_quantized and other.assignment.get(name) == scheme
    ]
    return len(same) >= _ALIKE * len(one.assignment)
