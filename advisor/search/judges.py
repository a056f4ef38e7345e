"""What candidates are judged on: texts, taken in growing parts, and a benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.tasks import Benchmark


@dataclass(frozen=True, slots=True)
class Judges:
    """What candidates are judged on.

    Attributes:
        evaluation: All sequences that may be measured.
        first: How many of them are measured at once; the rest where that does not decide.
        slices: Further texts, by name, each of which must meet the quality budgets on its own.
        benchmark: The task of an accuracy budget.
    """

    evaluation: TokenSequences
    first: int
    slices: Mapping[str, TokenSequences] = field(default_factory=dict)
    benchmark: Benchmark | None = None

    @property
    def texts(self) -> dict[str, TokenSequences]:
        """Every text by name; the main one has none."""
        return {"": self.evaluation, **self.slices}

    @property
    def looks(self) -> int:
        """How often a measurement may be looked at: its text doubles from one to the next."""
        longest = max(text.sequences for text in self.texts.values())
        return len(_ends(self.first, longest))

    def part(self, text: TokenSequences, look: int) -> TokenSequences | None:
        """Return the sequences that a look adds; None where the text has ended before."""
        ends = [0, *_ends(self.first, text.sequences)]
        return text.part(ends[look - 1], ends[look]) if look < len(ends) else None


def _ends(first: int, available: int) -> list[int]:
    """Return how many sequences are measured after each look: n, 2n, 4n, ... and all."""
    found = [min(first, available)]
    while found[-1] < available:
        found.append(min(2 * found[-1], available))
    return found
