"""Candidates that other libraries made: measured with the finalists, chosen only if they win."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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


def measure_outsiders(
    outsiders: Callable[[int | None], Iterable[Outside]],
    measurer: Measurer,
    max_bytes: int | None,
    stop: Callable[[], bool],
    progress: Callable[[Mixture], Callable[[int, int], None]],
) -> None:
    """Measure the candidates of other libraries; they join the measurer's finalists.

    Args:
        outsiders: Makes them, given the size of the largest.
        measurer: Measures them.
        max_bytes: The size budget; without one, they are to be no larger than the best uniform
            finalist, so that they compete at equal size.
        stop: Asked before each.
        progress: Told of each.
    """
    if stop():
        return
    limit = _limit(measurer.finalists) if max_bytes is None else max_bytes
    for outside in outsiders(limit):
        measurer.adopt(outside)
        measurer.measure(outside.mixture, progress(outside.mixture))
        if stop():
            return


def _limit(finalists: list[Finalist]) -> int | None:
    """Return the size of the uniform finalist of least KL; None where there is none."""
    uniform = [finalist for finalist in finalists if finalist.mixture.is_uniform]
    best = min(uniform, key=lambda finalist: finalist.measured_kl, default=None)
    return None if best is None else best.mixture.size_bytes
