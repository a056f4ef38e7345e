"""Make the textbook twins of this folder importable by their names, which are unique."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
