"""Progress on stderr: stage, done and total, best so far, time left."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from advisor.cli.options import state
from advisor.cli.output import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from advisor.workflows import ProgressEvent

_EVERY_S = 60.0
"""Between two lines of a stage that goes on, in logs."""


@contextmanager
def progress() -> Iterator[Callable[[ProgressEvent], None]]:
    """Yield a callback that shows events: a live bar on a terminal, a line a stage elsewhere."""
    if state.json and not state.verbose:
        yield lambda event: None
    elif sys.stderr.isatty():
        with _live() as callback:
            yield callback
    else:
        yield _Lines()


class _Lines:
    """Plain lines for logs and pipes: when a stage starts, every minute, and when it is done."""

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}
        self._said = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        done = bool(event.total) and event.done >= (event.total or 0)
        now = time.monotonic()
        if event.stage not in self._started:
            self._started[event.stage] = now, event.done
            self._said = now
            if _only_says(event):
                sys.stderr.write(f"{event.stage}: {event.note}\n")
                return
            sys.stderr.write(f"{event.stage} ...\n")
        start, first = self._started[event.stage]
        note = f"; {event.note}" if event.note else ""
        how_far = f"{event.stage}: {event.done} of {event.total}"
        if done:
            sys.stderr.write(f"{how_far} in {now - start:.0f} s{note}\n")
        elif event.total and event.done > first and now - self._said >= _EVERY_S:
            left = (now - start) * (event.total - event.done) / (event.done - first)
            sys.stderr.write(f"{how_far}, about {duration(left)} left{note}\n")
            self._said = now
        sys.stderr.flush()


def _only_says(event: ProgressEvent) -> bool:
    """Whether an event is no work, but something to know."""
    return event.total == 1 and event.done >= 1 and bool(event.note)


@contextmanager
def _live() -> Iterator[Callable[[ProgressEvent], None]]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    from advisor.cli.output import console

    # The note takes what the others leave: else bars would make room for it.
    stage = Column(no_wrap=True, overflow="ellipsis", max_width=36)
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    with Progress(
        TextColumn("{task.description:<26}", table_column=stage),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("[dim]{task.fields[note]}", table_column=rest),
        console=console(stderr=True),
        expand=True,
    ) as bars:
        tasks: dict[str, Any] = {}

        def callback(event: ProgressEvent) -> None:
            if event.stage not in tasks and _only_says(event):
                bars.console.print(f"{event.stage}: {event.note}", style="dim", highlight=False)
                return
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="")
            bars.update(
                tasks[event.stage], completed=event.done, total=event.total, note=event.note or ""
            )

        yield callback
