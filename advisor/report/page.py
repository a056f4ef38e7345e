"""The report: one self-contained HTML page made from a plan alone."""

from __future__ import annotations

from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING

from advisor.report.charts import Point, bits_map, frontier
from advisor.report.scatter import Scored, best_by_trial, scores_against_measured
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from advisor.plan.schema import Interval, Plan

STYLE = """
:root{--ink:#15202b;--soft:#5b6b7a;--line:#d8e0e7;--strong:#0b63c5;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#93a4b3;--line:#2c3a47;
--strong:#6cb0ff;--back:#0f1720}}
*{box-sizing:border-box}body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--back);max-width:52rem;margin:0 auto;padding:1.5rem 1rem 4rem}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}
.lead{font-size:1.05rem}.soft{color:var(--soft)}
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:.7rem;
margin:1rem 0}
.figures div{border:1px solid var(--line);border-radius:8px;padding:.6rem .8rem}
.figures b{display:block;font-size:1.25rem}.figures small{color:var(--soft)}
.wide,.plot{overflow-x:auto}.plot svg{display:block}
table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.35rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--soft)}code{font-size:.85em;overflow-wrap:anywhere}
svg{width:100%;height:auto;font:12px system-ui,sans-serif}
svg .axis{stroke:var(--soft);fill:none}svg .grid{stroke:var(--line)}
svg .bar{stroke:var(--soft);stroke-width:1.5}svg .limit{stroke:#c2410c;stroke-dasharray:4 3}
svg text{fill:var(--ink)}svg .small{fill:var(--soft);font-size:11px}svg .cell{font-size:9px}
svg .line{stroke:var(--strong);stroke-width:2;fill:none}
svg .point{fill:var(--soft)}svg .chosen{fill:var(--strong)}svg .label{font-size:11px}
svg .strong{fill:var(--strong);font-weight:600}
@media(max-width:40rem){.figures{grid-template-columns:repeat(2,1fr)}
svg .small,svg .label{font-size:16px}table.cards tr{display:block;padding:.5rem 0;
border-bottom:1px solid var(--line)}table.cards tr:first-child{display:none}
table.cards td{display:block;border:0;padding:.1rem 0}
table.cards td[data-label]::before{content:attr(data-label) ": ";color:var(--soft)}
table.cards td:empty{display:none}}
@media(min-width:40.01rem){table.cards td:first-child code{white-space:nowrap}}
@media print{body{max-width:none;padding:0;font-size:11pt}h2{break-after:avoid}
svg,tr,.figures div{break-inside:avoid}.wide,.plot{overflow:visible}.plot svg{max-height:9cm}
:root{--ink:#000;--soft:#444;--line:#bbb;--strong:#0b4fa0;--back:#fff}
*{print-color-adjust:exact}}
"""


_SMALLEST_FILE = 1000.0
"""Bytes: objectives above are sizes, KL in nats lies far below."""


def render_report(plan: Plan, modules: Sequence[str] = ()) -> str:
    """Return the page of a plan: no script, no network, one file.

    Args:
        plan: What to show.
        modules: Every quantizable module, for the map of bits; a plan names only those that
            differ from its default scheme.
    """
    # A folder's last part names the model; where it lies on one machine is nobody's business.
    name = plan.model.id if plan.model.id.count("/") == 1 else PurePath(plan.model.id).name
    title = f"{plan.scheme.name} for {name} on {plan.hardware.name}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{_answer(plan)}</p>',
        _figures(plan),
        *(_chart(title, svg) for title, svg in render_plots(plan, modules).items()),
        _apart(plan),
        _candidates(plan),
        _section("Kernel", [("engine", plan.engine.name), *_kernel(plan)]),
        _section("Treated otherwise", _otherwise(plan)),
        _section("How it was judged", _texts(plan)),
        _section("Reproduce", _provenance(plan)),
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
        "Bits per module": bits_map(_bits(plan, modules)),
        "Predicted and measured": scores_against_measured(_scored(plan)),
        "Trials": _trials(plan),
    }
    return {title: svg for title, svg in plots.items() if svg}


def _answer(plan: Plan) -> str:
    expected = plan.expected
    words = [f"<b>{escape(plan.scheme.name)}</b>, stored as {escape(plan.scheme.format)}"]
    words.append(
        f"takes {_size(expected.size_bytes)} ({expected.bits_per_weight:.2f} bits a weight)"
    )
    if expected.loss is not None:
        words.append(f"and costs {_percent(expected.loss)} of perplexity on held-out text")
    known = {
        "measured": "Measured.",
        "score": "Predicted by the search.",
        "evidence": "From evidence.",
    }
    return f"{', '.join(words[:2])} {' '.join(words[2:])}. {known[expected.basis]}"


def _figures(plan: Plan) -> str:
    expected = plan.expected
    cards = [
        ("size", _size(expected.size_bytes)),
        ("bits a weight", f"{expected.bits_per_weight:.2f}"),
    ]
    if expected.kl is not None:
        cards.append(("KL per token, nats", f"{expected.kl.value:.4f}"))
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


def _bits(plan: Plan, modules: Sequence[str]) -> dict[str, float]:
    chosen = dict.fromkeys(modules, plan.scheme.default) | plan.scheme.modules
    return {name: parse_scheme(scheme).bits for name, scheme in chosen.items()}


def _candidates(plan: Plan) -> str:
    if not plan.runners_up:
        return ""
    rows = [
        (
            f"<code>{escape(row.name)}</code>",
            _size(row.size_bytes),
            "" if row.kl is None else f"{row.kl.value:.4f}",
            "" if row.loss is None else _percent(row.loss),
            escape(row.basis),
            escape(row.reason),
        )
        for row in plan.runners_up
    ]
    head = ("candidate", "size", "KL", "loss, 95%", "known by", "why it lost")
    return f"<h2>Runners-up</h2>{_table(head, rows)}"


def _apart(plan: Plan) -> str:
    """Return what was measured on further texts and on a benchmark."""
    expected = plan.expected
    rows = [
        (escape(name), f"{row.kl.value:.4f}", _percent(row.loss), f"{row.top1_agreement.value:.1%}")
        for name, row in expected.slices.items()
    ]
    head = ("text", "KL", "loss, 95%", "top-1 agreement")
    parts = [f"<h2>Judged apart</h2>{_table(head, rows)}"] if rows else []
    if (found := expected.accuracy) is not None:
        line = (
            f"{found.value:.1%} of {found.questions} questions right, {found.reference:.1%} in 16 "
            f"bits: a drop of {_percent(found.drop)} points"
        )
        parts.append(_section("Benchmark", [(found.task, line)]))
    return "".join(parts)


def _kernel(plan: Plan) -> list[tuple[str, str]]:
    kernel = plan.engine.kernel
    rows = [("support", kernel.support), ("kernel", kernel.name or "none"), ("why", kernel.reason)]
    if kernel.source:
        rows.append(("source", kernel.source))
    return rows


def _otherwise(plan: Plan) -> list[tuple[str, str]]:
    """Return the modules that did not get what the others got, and how experts were covered."""
    rows = [
        (f"{row.modules} as {row.scheme}", f"{row.reason} (first: {row.first})")
        for row in plan.fallbacks
    ]
    if (seen := plan.expert_coverage) is not None:
        line = (
            f"{seen.helped} of {seen.experts} saw too few calibration tokens and were fitted with "
            f"the help of their layer's average inputs; {seen.unseen} saw none; fewest "
            f"{seen.fewest_tokens}, median {seen.median_tokens}"
        )
        rows.append(("experts", line))
        rows.extend(
            (path, f"tokens of each expert: {counts}") for path, counts in seen.layers.items()
        )
    return rows


def _texts(plan: Plan) -> list[tuple[str, str]]:
    rows = []
    texts = [("calibration", plan.calibration), ("evaluation", plan.evaluation)]
    for label, text in texts + [(f"slice {name}", text) for name, text in plan.slices.items()]:
        if text is not None:
            rows.append(
                (
                    label,
                    f"{text.corpus}: {text.sequences} sequences of {text.sequence_length} tokens, "
                    f"seed {text.seed}, sha256 {text.sha256[:16]}",
                )
            )
    if (fit := plan.calibration_fit) is not None:
        line = (
            f"{fit.token_coverage:.0%} of the evaluation's tokens occur in the calibration; "
            f"perplexity {fit.calibration_perplexity:.2f} and {fit.evaluation_perplexity:.2f}; "
            f"layer inputs {fit.moment_ratio:.1f} times as far apart as halves of the calibration"
        )
        rows.append(("calibration against evaluation", "; ".join([line, *fit.warnings])))
    if plan.search is not None:
        search = plan.search
        rows.append(("search", f"{search.trials} trials, {search.sampler}, seed {search.seed}"))
        if search.score_spearman is not None:
            rows.append(
                ("rank correlation", f"{search.score_spearman:.2f} of predicted and measured KL")
            )
    return rows


def _provenance(plan: Plan) -> list[tuple[str, str]]:
    rows = [
        ("model weights", plan.model.weights_sha256),
        ("model config", plan.model.config_sha256),
        ("tokenizer", plan.model.tokenizer_sha256),
    ]
    rows.extend((f"output {name}", digest) for name, digest in plan.outputs.items())
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in plan.versions.items())))
    return rows


def _section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    body = [(escape(label), f"<code>{escape(value)}</code>") for label, value in rows]
    return f"<h2>{title}</h2>{_table((), body)}" if rows else ""


def _chart(title: str, svg: str) -> str:
    return f'<h2>{title}</h2><div class="plot">{svg}</div>' if svg else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; with a head, its rows become cards with labels on a narrow screen."""
    if not head:
        body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
        return f'<div class="wide"><table>{body}</table></div>'
    top = "".join(f"<th>{cell}</th>" for cell in head)
    labels = ["", *(f' data-label="{escape(cell)}"' for cell in head[1:])]
    body = "".join(
        "<tr>"
        + "".join(f"<td{label}>{cell}</td>" for label, cell in zip(labels, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table class="cards"><tr>{top}</tr>{body}</table></div>'


def _size(value: int) -> str:
    if value < 1e6:
        return f"{value / 1e3:.1f} kB"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _percent(value: Interval) -> str:
    return f"{value.value * 100:.2f}% [{value.low * 100:.2f}, {value.high * 100:.2f}]"
