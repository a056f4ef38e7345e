"""Charts of the search itself: scores against measurements, and the best by trial."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from advisor.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    draw_frame,
    draw_svg,
    linear_ticks,
    log_ticks,
    tick_text,
    x_tick,
    y_tick,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_SMALLEST = 1e-7


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with a score and a measurement, both KL per token in nats."""

    name: str
    predicted: float
    measured: float
    chosen: bool = False


def _logarithm(value: float) -> float:
    return math.log10(max(value, _SMALLEST))


def scores_against_measured(points: Sequence[Scored]) -> str:
    """Draw measured against predicted KL, both logarithmic, with the diagonal; two points least."""
    if len(points) < 2:
        return ""
    values = [_logarithm(v) for point in points for v in (point.predicted, point.measured)]
    low, high = min(values) - 0.15, max(values) + 0.15

    def x(value: float) -> float:
        return LEFT + (_logarithm(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (_logarithm(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [draw_frame("predicted KL, nats", "measured KL, nats")]
    for tick in log_ticks(low, high):
        parts += [x_tick(x(tick), tick_text(tick)), y_tick(y(tick), tick_text(tick))]
    parts.append(
        f'<line class="axis" x1="{LEFT}" y1="{HEIGHT - BOTTOM}" x2="{WIDTH - RIGHT}" y2="{TOP}" '
        'stroke-dasharray="2 4"/>'
    )
    parts += [
        f'<circle class="{"chosen" if point.chosen else "point"}" cx="{x(point.predicted):.1f}" '
        f'cy="{y(point.measured):.1f}" r="{6 if point.chosen else 4}"><title>{escape(point.name)}: '
        f"predicted {point.predicted:.3g}, measured {point.measured:.3g}</title></circle>"
        for point in points
    ]
    return draw_svg("".join(parts), "Predicted and measured KL")


def best_by_trial(steps: Sequence[tuple[int, float]], trials: int, label: str) -> str:
    """Draw the best value so far as a staircase over the trials; empty without steps.

    Args:
        steps: (trial from 1, best value from then on), rising trials.
        trials: Trials in all.
        label: What the value is.
    """
    if not steps or trials < 2:
        return ""
    values = [value for _, value in steps]
    span = max(values) - min(values) or abs(max(values)) or 1.0
    low, high = min(values) - 0.1 * span, max(values) + 0.1 * span

    def x(trial: float) -> float:
        return LEFT + (trial - 1) / (trials - 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [draw_frame("trial", label)]
    parts += [x_tick(x(tick), f"{tick:g}") for tick in linear_ticks(1, trials) if tick == int(tick)]
    parts += [y_tick(y(tick), f"{tick:g}") for tick in linear_ticks(low, high)]
    path = f"M{x(steps[0][0]):.1f} {y(values[0]):.1f}"
    for trial, value in steps[1:]:
        path += f"H{x(trial):.1f}V{y(value):.1f}"
    parts.append(f'<path class="line" d="{path}H{x(trials):.1f}"/>')
    parts += [
        f'<circle class="point" cx="{x(trial):.1f}" cy="{y(value):.1f}" r="3">'
        f"<title>trial {trial}: {value:g}</title></circle>"
        for trial, value in steps
    ]
    return draw_svg("".join(parts), "Best by trial")
