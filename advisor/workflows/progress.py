"""What long work says while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """One step of a stage.

    Attributes:
        stage: What is being done, in words.
        done: Steps finished.
        total: Steps in all; None when not known.
        note: What a person wants to see beside it, for example the best so far.
    """

    stage: str
    done: int
    total: int | None = None
    note: str = ""


ProgressCallback = Callable[[ProgressEvent], None]


def ignore_progress(event: ProgressEvent) -> None:
    """Take an event and do nothing with it."""


def stage(callback: ProgressCallback, name: str) -> Callable[[int, int], None]:
    """Return a ``(done, total)`` callback that reports one stage."""

    def report(done: int, total: int) -> None:
        callback(ProgressEvent(name, done, total))

    return report
