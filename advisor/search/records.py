"""Measurements on disk: what was measured of a candidate on a text is never measured again."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from advisor.evaluation.measure import Measurement
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from advisor.methods.settings import QuantizationSettings
    from advisor.search.mixture import Mixture

_VERSION = 3
"""Part of every key: raised when the same candidate is measured on other codes."""
_ARRAYS = ("sequence_kl", "sequence_nll", "sequence_reference_nll", "sequence_agreement")
_SCORES = "scores"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Records:
    """Per-sequence results of candidates, one file for each candidate and text.

    Attributes:
        folder: Where they are.
        settings: The methods' settings that families refine.
        statistics: Key of the calibration statistics.
    """

    folder: Path
    settings: QuantizationSettings
    statistics: str

    def _path(self, mixture: Mixture, evaluation: str) -> Path:
        key = sha256_json(
            {
                "version": _VERSION,
                "candidate": mixture.identity(self.settings),
                "statistics": self.statistics,
                "evaluation": evaluation,
            }
        )
        return self.folder / f"{key}.json"

    def measurement(self, mixture: Mixture, evaluation: str) -> Measurement | None:
        """Return what was measured, of the first sequences alone where that ended early; or None.

        Args:
            mixture: The candidate.
            evaluation: Hash of the text's tokens.
        """
        path = self._path(mixture, evaluation)
        if not path.is_file():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            return Measurement(**{name: np.array(document[name], np.float64) for name in _ARRAYS})
        except (ValueError, KeyError, TypeError):
            _logger.warning("measurement %s is damaged and will be made again", path)
            return None

    def scores(self, mixture: Mixture, benchmark: str) -> NDArray[np.float64] | None:
        """Return a candidate's scores on a benchmark, or None."""
        return read_scores(self._path(mixture, benchmark))

    def keep(self, mixture: Mixture, evaluation: str, found: Measurement) -> None:
        """Keep a measurement."""
        self._write(mixture, evaluation, {name: getattr(found, name).tolist() for name in _ARRAYS})

    def keep_scores(self, mixture: Mixture, benchmark: str, scores: NDArray[np.float64]) -> None:
        """Keep a candidate's scores on a benchmark."""
        self._write(mixture, benchmark, {_SCORES: scores.tolist()})

    def _write(self, mixture: Mixture, evaluation: str, document: dict[str, object]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        named = {"name": mixture.name, "size_bytes": mixture.size_bytes} | document
        write_atomically(self._path(mixture, evaluation), json.dumps(named))


def read_scores(path: Path) -> NDArray[np.float64] | None:
    """Return stored scores, or None where there are none to be trusted."""
    if not path.is_file():
        return None
    try:
        return np.array(json.loads(path.read_text(encoding="utf-8"))[_SCORES], np.float64)
    except (ValueError, KeyError, TypeError):
        _logger.warning("scores %s are damaged and will be made again", path)
        return None


def write_scores(path: Path, scores: NDArray[np.float64]) -> None:
    """Write scores as :func:`read_scores` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({_SCORES: scores.tolist()}))
