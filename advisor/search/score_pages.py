"""Scores on disk, by content."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from advisor.plan.files import write_atomically
from advisor.search.score import Score

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from advisor.schemes import Scheme

_logger = logging.getLogger(__name__)


class ScorePages:
    """One scheme's scores a file; what was read or written once stays in memory."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, which may not be there yet."""
        self._folder = folder
        self._known: dict[str, dict[str, Score]] = {}

    def find(self, key: str) -> dict[str, Score] | None:
        """Return the scores of all modules under a key; None where they are not known."""
        if key not in self._known:
            path = self._folder / f"{key}.json"
            if not path.is_file():
                return None
            try:
                document = json.loads(path.read_text(encoding="utf-8"))
                self._known[key] = {name: Score(*pair) for name, pair in document["scores"].items()}
            except (ValueError, KeyError, TypeError):
                _logger.warning("scores in %s are damaged and will be computed again", path)
                return None
        return self._known[key]

    def keep(self, key: str, scheme: Scheme, scores: Mapping[str, Score]) -> None:
        """Write the scores of a scheme under a key."""
        self._known[key] = dict(scores)
        self._folder.mkdir(parents=True, exist_ok=True)
        document = {
            "scheme": str(scheme),
            "scores": {name: [score.kl, score.error] for name, score in scores.items()},
        }
        write_atomically(self._folder / f"{key}.json", json.dumps(document))
