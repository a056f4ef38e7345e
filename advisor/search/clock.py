"""How long a search has run, and whether it is to stop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.search.planning import Stopped


@dataclass(slots=True)
class Clock:
    """Time and the wish to stop."""

    budget_s: float | None
    asked: Callable[[], bool]
    started: float = field(default_factory=time.monotonic)
    stopped: Stopped = "completed"

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return time.monotonic() - self.started

    def over(self, share: float = 1.0) -> bool:
        """Whether to stop, remembering why."""
        if self.stopped == "interrupted" or self.asked():
            self.stopped = "interrupted"
            return True
        if self.budget_s is not None and self.seconds > share * self.budget_s:
            self.stopped = "time budget"
            return True
        return False
