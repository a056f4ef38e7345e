"""Candidates that other libraries made: measured with the finalists, chosen only if they win."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from advisor.schemes import Scheme
    from advisor.search.finalists import Finalist
    from advisor.search.measuring import Measurer
    from advisor.search.mixture import Mixture
    from advisor.search.realise import Realised


@dataclass(frozen=True, slots=True)
class Outside:
    """A candidate of another library, as its checkpoint holds it.

    Attributes:
        mixture: The candidate; its ``backend`` names the library.
        load: Reads its weights.
    """

    mixture: Mixture
    load: Callable[[], Realised]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the candidates of other libraries must keep to be worth making.

    Attributes:
        max_bytes: Size of the largest; None for any.
        is_fast: Whether modules of these schemes, in a checkpoint of this format, are as fast as
            what the search may mix.
    """

    max_bytes: int | None
    is_fast: Callable[[Mapping[str, Scheme], str | None], bool]


class Outsiders(Protocol):
    """Makes candidates of other libraries."""

    def __call__(self, wanted: Wanted) -> Iterable[Outside]:
        """Make them, one by one."""
        ...

    def predicted_bytes(self, max_bytes: int | None) -> int:
        """Return what those of at most so many bytes will add to the disk."""
        ...


def measure_outsiders(
    outsiders: Outsiders,
    measurer: Measurer,
    wanted: Wanted,
    stop: Callable[[], bool],
    progress: Callable[[Mixture], Callable[[int, int], None]],
) -> None:
    """Measure the candidates of other libraries; they join the measurer's finalists.

    Args:
        outsiders: Makes them, given what they must be.
        measurer: Measures them.
        wanted: Size and speed; without a size, they are to be no larger than the best uniform
            finalist, so that they compete at equal size.
        stop: Asked before each.
        progress: Told of each.
    """
    if stop():
        return
    if wanted.max_bytes is None:
        wanted = replace(wanted, max_bytes=_limit(measurer.finalists))
    for outside in outsiders(wanted):
        measurer.adopt(outside)
        measurer.measure(outside.mixture, progress(outside.mixture))
        if stop():
            return


def _limit(finalists: list[Finalist]) -> int | None:
    """Return the size of the uniform finalist of least KL; None where there is none."""
    uniform = [finalist for finalist in finalists if finalist.mixture.is_uniform]
    best = min(uniform, key=lambda finalist: finalist.measured_kl, default=None)
    return None if best is None else best.mixture.size_bytes
