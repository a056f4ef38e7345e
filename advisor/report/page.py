"""The report: one self-contained HTML page made from a plan alone."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from advisor.report.bits_map import bits_map
from advisor.report.charts import Point, frontier
from advisor.report.scatter import Scored, best_by_trial, scores_against_measured
from advisor.report.sections import (
    judged_apart,
    kernel_rows,
    kl_text,
    percent_text,
    provenance,
    section,
    size_text,
    table,
    texts_and_search,
    treated_otherwise,
)
from advisor.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.plan.schema import Plan

_SMALLEST_FILE = 1000.0
"""Bytes: objectives above are sizes, KL in nats lies far below."""


def render_report(plan: Plan, modules: Sequence[str] = ()) -> str:
    """Return the page of a plan: no script, no network, one file.

    Args:
        plan: What to show.
        modules: Every quantizable module, for the map of bits; a plan names only those that
            differ from its default scheme.
    """
    title = f"{plan.scheme.name} for {plan.model.title} on {plan.hardware.title}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_answer(plan)}</p>',
        f'<p class="unmet">{_unmet(plan)}</p>' if plan.unmet else "",
        _figures(plan),
        *(_chart(title, svg) for title, svg in render_plots(plan, modules).items()),
        judged_apart(plan),
        _candidates(plan),
        section("Kernel", [("engine", plan.engine.name), *kernel_rows(plan)]),
        section("Treated otherwise", treated_otherwise(plan)),
        section("How it was judged", texts_and_search(plan)),
        section("Reproduce", provenance(plan)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(sections)}</body></html>\n"
    )


def render_plots(plan: Plan, modules: Sequence[str] = ()) -> dict[str, str]:
    """Return the page's plots as SVG by title; those that have something to show.

    Args:
        plan: What to show.
        modules: Every quantizable module.
    """
    plots = {
        "Loss against size": _frontier(plan),
        "Bits per module": bits_map(_schemes(plan, modules), plan.scheme.format),
        "Predicted and measured": scores_against_measured(_scored(plan)),
        "Trials": _trials(plan),
    }
    return {title: svg for title, svg in plots.items() if svg}


def _answer(plan: Plan) -> str:
    expected = plan.expected
    words = [f"<b>{escape(plan.scheme.name)}</b>, stored as {escape(plan.scheme.format)}"]
    words.append(
        f"takes {size_text(expected.size_bytes)} ({expected.bits_per_weight:.2f} bits a weight)"
    )
    if expected.loss is not None:
        words.append(f"and costs {percent_text(expected.loss)} of perplexity on held-out text")
    known = {
        "measured": "Measured.",
        "score": "Predicted by the search.",
        "evidence": "From evidence.",
    }
    return f"{', '.join(words[:2])} {' '.join(words[2:])}. {known[expected.basis]}"


def _unmet(plan: Plan) -> str:
    return (
        "<b>Not within the budgets.</b> Nothing that was measured meets them all, and this came "
        f"nearest: {escape(plan.unmet or '')}."
    )


def _figures(plan: Plan) -> str:
    expected = plan.expected
    cards = [
        ("size", size_text(expected.size_bytes)),
        ("bits a weight", f"{expected.bits_per_weight:.2f}"),
    ]
    if expected.kl is not None:
        cards.append(("KL per token, nats", kl_text(expected.kl.value)))
    if expected.loss is not None:
        cards.append(("perplexity increase", f"{expected.loss.value * 100:.2f}%"))
    if expected.top1_agreement is not None:
        cards.append(("top-1 agreement", f"{expected.top1_agreement.value * 100:.1f}%"))
    if expected.perplexity is not None and expected.reference_perplexity is not None:
        cards.append(
            (
                "perplexity, 16-bit",
                f"{expected.perplexity:.2f}, {expected.reference_perplexity:.2f}",
            )
        )
    items = "".join(f"<div><b>{value}</b><small>{label}</small></div>" for label, value in cards)
    return f'<div class="figures">{items}</div>'


def _frontier(plan: Plan) -> str:
    points = [
        Point(row.name, row.size_bytes, row.kl.value, row.kl.low, row.kl.high)
        for row in plan.runners_up
        if row.kl is not None and row.basis == "measured"
    ]
    chosen = plan.expected.kl
    if chosen is not None:
        points.append(
            Point(
                plan.scheme.name,
                plan.expected.size_bytes,
                chosen.value,
                chosen.low,
                chosen.high,
                True,
            )
        )
    return frontier(points, plan.budgets.max_size_bytes)


def _scored(plan: Plan) -> list[Scored]:
    """Return what was both scored and measured; sequential codes have no score of their own."""
    found = [
        Scored(row.name, row.predicted_kl, row.kl.value)
        for row in plan.runners_up
        if row.kl is not None
        and row.predicted_kl is not None
        and ", sequential, " not in row.reason
    ]
    expected = plan.expected
    if (
        expected.kl is not None
        and expected.predicted_kl is not None
        and not plan.settings.get("sequential")
    ):
        found.append(Scored(plan.scheme.name, expected.predicted_kl, expected.kl.value, True))
    return found


def _trials(plan: Plan) -> str:
    if plan.search is None or not plan.search.best:
        return ""
    is_size = plan.search.best[0][1] > _SMALLEST_FILE
    steps = [(trial, value / 1e6 if is_size else value) for trial, value in plan.search.best]
    label = "smallest within the budgets, MB" if is_size else "best predicted KL, nats"
    return best_by_trial(steps, plan.search.trials, label)


def _schemes(plan: Plan, modules: Sequence[str]) -> dict[str, str]:
    return dict.fromkeys(modules, plan.scheme.default) | plan.scheme.modules


def _candidates(plan: Plan) -> str:
    if not plan.runners_up:
        return ""
    rows = [
        (
            f"<code>{escape(row.name)}</code>",
            size_text(row.size_bytes),
            "" if row.kl is None else kl_text(row.kl.value),
            "" if row.loss is None else percent_text(row.loss),
            escape(row.basis),
            escape(row.reason),
        )
        for row in plan.runners_up
    ]
    head = ("candidate", "size", "KL", "loss, 95%", "known by", "why it lost")
    return f"<h2>Runners-up</h2>{table(head, rows)}"


def _chart(title: str, svg: str) -> str:
    return f'<h2>{title}</h2><div class="plot">{svg}</div>' if svg else ""
