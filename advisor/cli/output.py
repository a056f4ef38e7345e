"""How results are shown: JSON for programs, tables and words for people."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

from advisor.cli.options import state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one document of ``--json``."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def console(*, stderr: bool = False) -> Console:
    """Return a console for people, as wide as the terminal; a pipe has $COLUMNS, or 110."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    known = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    width = None if known else 110
    return Console(stderr=stderr, highlight=False, soft_wrap=False, width=width)


def show(document: Mapping[str, Any], render: Any) -> None:
    """Print the document with ``--json``, else what ``render(console, document)`` draws."""
    if state.json:
        print_json(document)
    else:
        render(console(), document)


def print_notes(console: Console, document: Mapping[str, Any]) -> None:
    """Print what was understood otherwise than it was asked."""
    for note in document["notes"]:
        console.print(f"[yellow]Note[/] {note}")


def table(*columns: str, title: str | None = None, right: Sequence[int] = ()) -> Any:
    """Return an empty table in the house style.

    Args:
        *columns: Headings.
        title: Shown above, at the left.
        right: Indices of right-aligned columns.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold",
                   pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))  # fmt: skip
    for index, heading in enumerate(columns):
        result.add_column(heading, justify="right" if index in right else "left", overflow="fold")
    return result


def fitting_columns(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    width: int,
    *,
    dropped: Sequence[str],
) -> list[str]:
    """Return the columns that fit without a wrapped cell.

    Args:
        columns: Headings in order.
        rows: Heading to text, a row each.
        width: Characters there are.
        dropped: Headings that may go, the first to go first.
    """
    kept = list(columns)

    def total() -> int:
        widths = (max(len(text) for text in (name, *(row[name] for row in rows))) for name in kept)
        return sum(widths) + 2 * (len(kept) - 1)

    for name in dropped:
        if total() <= width:
            break
        kept.remove(name)
    return kept


def device(hardware: Mapping[str, Any]) -> str:
    """Return the name of a device, with its number where there are several: ``2x L4``."""
    return (
        hardware["name"] if hardware["count"] == 1 else f"{hardware['count']}x {hardware['name']}"
    )


_SMALL = 1e-4
"""Numbers below this are printed as powers of ten: five decimals would say nothing."""


def size(value: float | None) -> str:
    """Return bytes in decimal units: ``5.73 GB``."""
    if value is None:
        return "unknown"
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            digits = 2 if value < 10 * factor else 1 if value < 100 * factor else 0
            return f"{value / factor:.{digits}f} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """Return a number of parameters in three digits: ``8.03 B``, ``135 M``, ``336 K``."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        # What would round to 1000 of a unit is 1.00 of the next.
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f}"


def percent(value: float | None) -> str:
    """Return a fraction as a percentage: ``3.1%``."""
    if value is None:
        return "unknown"
    magnitude = abs(value) * 100
    digits = 2 if magnitude < 1 else 1 if magnitude < 100 else 0
    return f"{value * 100:.{digits}f}%"


def interval(value: Mapping[str, float] | None, *, middle: str, kind: str = "percent") -> str:
    """Return ``1.23% [0.92, 1.61]``: three digits of the largest, from low, high and ``middle``.

    No more than a thousandth of a percent, or five decimals of another number: no text is so long
    that finer ones would mean anything.
    """
    if value is None or value.get(middle) is None:
        return "unknown"
    factor, unit = (100.0, "%") if kind == "percent" else (1.0, "")
    low, centre, high = (factor * value[key] for key in ("low", middle, "high"))
    spread = max(abs(low), abs(centre), abs(high))
    if kind == "number" and 0 < spread < _SMALL:
        return f"{centre:.1e} [{low:.1e}, {high:.1e}]"
    finest = 3 if kind == "percent" else 5
    digits = min(finest, max(0, 2 - math.floor(math.log10(spread)))) if spread else 0
    return f"{centre:.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def short_interval(value: Mapping[str, float] | None, *, middle: str) -> str:
    """Return ``1.1% [0.46-2.7]``: two digits are all that a prediction is good for."""
    if value is None or value.get(middle) is None:
        return "unknown"
    low, centre, high = (_two_digits(100 * value[key]) for key in ("low", middle, "high"))
    return f"{centre}%" if low == high else f"{centre}% [{low}-{high}]"


def _two_digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:#.2g}" if value else "0"


def speed(value: Mapping[str, float] | None) -> str:
    """Return ``85 [61-110]`` tokens per second, or unknown."""
    if not value or value.get("expected") is None:
        return "unknown"
    return f"{value['expected']:.0f} [{value['low']:.0f}-{value['high']:.0f}]"


def duration(seconds: float | None) -> str:
    """Return ``2 min 05 s``."""
    if seconds is None:
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def minutes(value: float) -> str:
    """Return a rough time: ``16 min``, ``2.5 h``."""
    if value < 1:
        return "under 1 min"
    return f"{value:.0f} min" if value < 90 else f"{value / 60:.1f} h"


def computed_on(console: Any, where: dict[str, Any] | None) -> None:
    """Say which accelerator computed, or why one that is there did not; nothing of a CPU alone."""
    if not where:
        return
    if where["device"] != "cpu":
        console.print(f"Computed on {where['name']} ({where['device']}).")
    elif where["reason"]:
        console.print(f"[yellow]Computed on the CPU[/]: {where['reason']}.", soft_wrap=True)
