"""Charts as inline SVG: readable on a phone, in print and without a network."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 84, 16, 16, 48


@dataclass(frozen=True, slots=True)
class Point:
    """One candidate of the frontier chart.

    Attributes:
        name: Its name.
        size_bytes: Bytes of its weight files.
        kl: Mean KL divergence per token, nats.
        low: Lower end of the 95% interval.
        high: Upper end of the 95% interval.
        chosen: Whether it is the answer.
    """

    name: str
    size_bytes: int
    kl: float
    low: float
    high: float
    chosen: bool = False


def frontier(points: Sequence[Point], size_limit: int | None = None) -> str:
    """Draw KL (logarithmic) against size, with intervals; empty without points."""
    if not points:
        return ""
    sizes = [point.size_bytes / 1e6 for point in points]
    if size_limit is not None:
        sizes.append(size_limit / 1e6)
    margin = 0.06 * (max(sizes) - min(sizes) or max(sizes))
    x_low, x_high = min(sizes) - margin, max(sizes) + margin
    floor = min(point.kl for point in points) / 4
    y_low = math.log10(max(min(max(point.low, floor) for point in points), 1e-7)) - 0.1
    y_high = math.log10(max(point.high for point in points)) + 0.1

    def x(megabytes: float) -> float:
        return LEFT + (megabytes - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y(kl: float) -> float:
        share = (math.log10(max(kl, 1e-7)) - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = [draw_frame("size of the weight files, MB", "KL per token, nats")]
    for tick in linear_ticks(x_low, x_high):
        parts.append(x_tick(x(tick), f"{tick:g}"))
    for tick in log_ticks(y_low, y_high):
        parts.append(y_tick(y(tick), tick_text(tick)))
    if size_limit is not None:
        at = round(x(size_limit / 1e6), 1)
        shift, side = (4, "start") if at < LEFT + 70 else (-4, "end")
        parts.append(
            f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" '
            f'y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="small" x="{at + shift}" y="{TOP + 10}" text-anchor="{side}">'
            "budget</text>"
        )
    for point in points:
        centre = x(point.size_bytes / 1e6)
        mark = "chosen" if point.chosen else "point"
        bar = (y(max(point.low, floor)), y(point.high))
        parts.append(
            f'<line class="bar" x1="{centre:.1f}" x2="{centre:.1f}" y1="{bar[0]:.1f}" '
            f'y2="{bar[1]:.1f}"/><circle class="{mark}" cx="{centre:.1f}" cy="{y(point.kl):.1f}" '
            f'r="{6 if point.chosen else 4}"><title>{escape(point.name)}</title></circle>'
        )
    parts.extend(_labels([(x(point.size_bytes / 1e6), y(point.kl), point) for point in points]))
    return draw_svg("".join(parts), "Loss against size")


def _labels(marks: list[tuple[float, float, Point]]) -> list[str]:
    """Name the points, each beside its own; the answer's first, and none where there is no room.

    A name that several points share is written once, at the chosen point or the lowest. Every point
    has its name as a tooltip, and the table below the chart has all of them.
    """
    ordered = sorted(marks, key=lambda mark: mark[1])
    owners = {mark[2].name: mark[2] for mark in ordered}
    owners |= {mark[2].name: mark[2] for mark in ordered if mark[2].chosen}
    named = [mark for mark in ordered if owners[mark[2].name] is mark[2]]
    taken = [_Box(left - 5, left + 5, top - 5, top + 5) for left, top, _ in marks]
    found: dict[str, str] = {}
    for left, top, point in sorted(named, key=lambda mark: not mark[2].chosen):
        places = [_place(point.name, left, top + down, side) for down, side in _places(left)]
        free = [place for place in places if not any(place[0].meets(box) for box in taken)]
        if not free and not point.chosen:
            continue
        box, words = (free or places)[0]
        taken.append(box)
        kind = "label strong" if point.chosen else "label"
        found[point.name] = f'<text class="{kind}" {words}>{escape(point.name)}</text>'
    return [found[point.name] for _, _, point in named if point.name in found]


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    right: float
    top: float
    bottom: float

    def meets(self, other: _Box) -> bool:
        """Return whether two boxes have a point in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom


def _places(left: float) -> list[tuple[int, str]]:
    """Return offsets of a label's middle and its side, the best first."""
    sides = ("end", "start") if left > WIDTH * 0.62 else ("start", "end")
    return [(down, side) for down in (-8, 9, -20, 21) for side in sides]


def _place(name: str, left: float, middle: float, side: str) -> tuple[_Box, str]:
    """Return what a label covers, in the large letters of a phone, and its attributes."""
    width, half = 8.4 * len(name), 7.5
    start = left + 8 if side == "start" else left - 8 - width
    # A label that leaves the plot meets everything: it is never free.
    outside = start < LEFT or start + width > WIDTH or not TOP - 8 < middle < HEIGHT - BOTTOM
    box = _Box(0, WIDTH, 0, HEIGHT) if outside else _Box(
        start, start + width, middle - half, middle + half
    )  # fmt: skip
    at = left + 8 if side == "start" else left - 8
    return box, f'x="{at:.1f}" y="{middle + 4:.1f}" text-anchor="{side}"'


def linear_ticks(low: float, high: float) -> list[float]:
    """Return round values between two, about five."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 7)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two logarithms; round values if few are."""
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(low), math.ceil(high) + 1)
        for factor in (1, 2, 5)
    ]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return inside if len(inside) >= 3 else linear_ticks(10.0**low, 10.0**high)


def tick_text(value: float) -> str:
    """Return a number in six characters, which is what an axis has room for on a phone."""
    text = f"{value:g}"
    if len(text) <= 6:
        return text
    power = math.floor(math.log10(value))
    return f"{value / 10**power:.3g}e{power}"


def draw_frame(x_title: str, y_title: str) -> str:
    """Return both axes and their titles."""
    bottom, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>'
        f'<text class="small" x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 8}" '
        f'text-anchor="middle">{x_title}</text>'
        f'<text class="small" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{y_title}</text>'
    )


def x_tick(at: float, text: str) -> str:
    """Return a tick of the horizontal axis."""
    top = HEIGHT - BOTTOM
    return (
        f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{top + 4}"/>'
        f'<text class="small" x="{at:.1f}" y="{top + 16}" text-anchor="middle">{text}</text>'
    )


def y_tick(at: float, text: str) -> str:
    """Return a tick of the vertical axis and its grid line."""
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="small" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    )


def draw_svg(body: str, title: str, height: int = HEIGHT) -> str:
    """Return a drawing that fills its column and has a name for screen readers."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg">{body}</svg>'
    )
