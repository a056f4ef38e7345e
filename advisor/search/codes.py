"""Codes of finalists on disk: what a later one has in common with an earlier is not made again.

Mixtures of one family differ from each other, and from the family's uniform candidates, in some
modules alone. A module's codes depend on its own weight, scheme, settings and statistics, unless
scales are folded between modules or blocks follow quantized ones: such codes are not shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.methods.input_scales import for_inputs
from advisor.numerics.spilled_weights import SpilledWeights
from advisor.plan.hashing import sha256_json
from advisor.schemes import ACTIVATIONS
from advisor.search.families import bare, finishing_settings, relevant_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

_VERSION = 3
"""Part of every key: raised when the same settings make other codes."""


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

    def twins(
        self,
        names: Sequence[str],
        scheme: Scheme,
        statistics: LayerStatistics | None,
        settings: QuantizationSettings,
        samples: int | None,
    ) -> list[QuantizedWeight] | None:
        """Return modules whose codes an earlier candidate has, with something else done to inputs.

        Args:
            names: Modules that are quantized together.
            scheme: Theirs.
            statistics: Of their inputs, whose scale may be calibrated.
            settings: The methods' settings.
            samples: Prefix of the calibration sequences; None for all.
        """
        for key in twin_keys(names, scheme, settings, samples) if self._shared else ():
            places = [f"{key}/{name}" for name in names]
            if all(place in self._file for place in places):
                found = [self._file[place] for place in places]
                return [for_inputs(weight, scheme, statistics, settings) for weight in found]
        return None

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
    finishing = finishing_settings(scheme, settings)
    return sha256_json([_VERSION, list(names), str(scheme), relevant, finishing])


def twin_keys(
    names: Sequence[str], scheme: Scheme, settings: QuantizationSettings, samples: int | None
) -> list[str]:
    """Return the keys of schemes that do other things to inputs and have the same codes.

    Args:
        names: Modules that are quantized together.
        scheme: Theirs.
        settings: The methods' settings.
        samples: Prefix of the calibration sequences; None for all.
    """
    stored = bare(scheme)
    found = []
    for activation in (None, *ACTIVATIONS):
        twin = replace(stored, activation=activation)
        if twin != scheme and bare(twin) == stored:
            found.append(codes_key(names, twin, settings, samples))
    return found
