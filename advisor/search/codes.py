"""Codes of finalists on disk: what a later one has in common with an earlier is not made again.

Mixtures of one family differ from each other, and from the family's uniform candidates, in some
modules alone. A module's codes depend on its own weight, scheme, settings and statistics, unless
scales are folded between modules or blocks follow quantized ones: such codes are not shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from advisor.numerics.spilled_weights import SpilledWeights
from advisor.plan.hashing import sha256_json
from advisor.search.families import finishing_settings, relevant_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme


class CandidateCodes(Mapping[str, "QuantizedWeight"]):
    """One candidate's quantized weights by module path, read from disk one at a time."""

    def __init__(self, file: SpilledWeights, *, shared: bool) -> None:
        """Start without any.

        Args:
            file: Where they are, with those of other candidates.
            shared: Whether equal modules of other candidates have equal codes.
        """
        self._file = file
        self._shared = shared
        self._places: dict[str, str] = {}

    def find(self, names: Sequence[str], key: str) -> bool:
        """Take over modules that were quantized together for an earlier candidate, if they were.

        Args:
            names: The modules.
            key: From :func:`codes_key`.
        """
        places = {name: f"{key}/{name}" for name in names}
        if not self._shared or any(place not in self._file for place in places.values()):
            return False
        self._places |= places
        return True

    def add(self, name: str, key: str, weight: QuantizedWeight) -> None:
        """Keep a module's codes."""
        place = f"{key}/{name}" if self._shared else f"{id(self)}/{name}"
        self._file.add(place, weight)
        self._places[name] = place

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read a weight from the disk."""
        return self._file[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        """Go over the names, in the order that they were added in."""
        return iter(self._places)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._places)


class CodePool:
    """Files of finalists' codes, which vanish with this object or its process."""

    def __init__(self, folder: Path, most_bytes: int = 0) -> None:
        """Start empty.

        Args:
            folder: Where the nameless files are.
            most_bytes: That earlier candidates' codes may take while a new one's are made; beyond
                that they are dropped. 0 keeps none.
        """
        self._folder = folder
        self._most_bytes = most_bytes
        self._file: SpilledWeights | None = None

    def candidate(self, *, shared: bool) -> CandidateCodes:
        """Return a place for a candidate's codes.

        Args:
            shared: Whether its modules' codes depend on nothing but what their keys say.
        """
        if not shared:
            return CandidateCodes(SpilledWeights(self._folder), shared=False)
        if self._file is None or self._file.size_bytes > self._most_bytes:
            self._file = SpilledWeights(self._folder)
        return CandidateCodes(self._file, shared=True)


def codes_key(
    names: Sequence[str], scheme: Scheme, settings: QuantizationSettings, samples: int | None
) -> str:
    """Return what the codes of modules depend on, their weights and statistics aside.

    Args:
        names: Modules that are quantized together.
        scheme: Theirs.
        settings: The methods' settings.
        samples: Prefix of the calibration sequences; None for all.
    """
    relevant = relevant_settings(scheme, settings, samples)
    return sha256_json([list(names), str(scheme), relevant, finishing_settings(scheme, settings)])
