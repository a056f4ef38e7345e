"""Where Advisor keeps what can be computed again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of everything that can be computed again: $ADVISOR_CACHE or ~/.cache."""
    chosen = os.environ.get("ADVISOR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "advisor"
