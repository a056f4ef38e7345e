"""The tables of the report: what a plan says in rows."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from advisor.plan.schema import Interval, Plan


def judged_apart(plan: Plan) -> str:
    """Return what was measured on further texts and on a benchmark."""
    expected = plan.expected
    rows = [
        (
            escape(name),
            kl_text(row.kl.value),
            percent_text(row.loss),
            f"{row.top1_agreement.value:.1%}",
        )
        for name, row in expected.slices.items()
    ]
    head = ("text", "KL", "loss, 95%", "top-1 agreement")
    parts = [f"<h2>Judged apart</h2>{table(head, rows)}"] if rows else []
    if (found := expected.accuracy) is not None:
        line = (
            f"{found.value:.1%} of {found.questions} questions right, {found.reference:.1%} in 16 "
            f"bits: a drop of {percent_text(found.drop)} points"
        )
        parts.append(section("Benchmark", [(found.task, line)]))
    return "".join(parts)


def kernel_rows(plan: Plan) -> list[tuple[str, str]]:
    """Return how the engine runs the scheme."""
    kernel = plan.engine.kernel
    rows = [("support", kernel.support), ("kernel", kernel.name or "none"), ("why", kernel.reason)]
    if kernel.source:
        rows.append(("source", kernel.source))
    return rows


def treated_otherwise(plan: Plan) -> list[tuple[str, str]]:
    """Return the modules that did not get what the others got, and how experts were covered."""
    rows = [
        (f"{row.modules} as {row.scheme}", f"{row.reason} (first: {row.first})")
        for row in plan.fallbacks
    ]
    rows += [(name, f"{scheme} (embedding or head)") for name, scheme in plan.scheme.outer.items()]
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


def texts_and_search(plan: Plan) -> list[tuple[str, str]]:
    """Return the texts, how well they match, and the search."""
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
        if fit.warnings:
            line += ". The texts differ: the figures here hold for text like the evaluation's"
        rows.append(("calibration against evaluation", line))
    if plan.search is not None:
        search = plan.search
        effort = "" if search.effort == "full" else f", {search.effort} effort"
        line = f"{search.trials} trials, {search.sampler}, seed {search.seed}{effort}"
        rows.append(("search", line))
        if search.passed_over:
            rows.append(("not searched", "; ".join(search.passed_over)))
        if search.score_spearman is not None:
            rows.append(
                ("rank correlation", f"{search.score_spearman:.2f} of predicted and measured KL")
            )
    return rows


def provenance(plan: Plan) -> list[tuple[str, str]]:
    """Return hashes and versions."""
    rows = [
        ("model weights", plan.model.weights_sha256),
        ("model config", plan.model.config_sha256),
        ("tokenizer", plan.model.tokenizer_sha256),
    ]
    rows.extend((f"output {name}", digest) for name, digest in plan.outputs.items())
    if (device := plan.computed_on) is not None:
        threads = f", {device.threads} thread{'s' * (device.threads > 1)}" if device.threads else ""
        rows.append(("computed on", f"{device.name} ({device.device}{threads})"))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in plan.versions.items())))
    return rows


def section(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """Return a title over rows of labels and values; nothing where there are none."""
    body = [(escape(label), f"<code>{escape(value)}</code>") for label, value in rows]
    return f"<h2>{title}</h2>{table((), body)}" if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
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


def size_text(value: int) -> str:
    """Print bytes as kB, MB or GB, finely enough to tell candidates of one budget apart."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if value >= factor:
            digits = 3 if value < 10 * factor else 2 if value < 100 * factor else 1
            return f"{value / factor:.{digits}f} {unit}"
    return f"{value / 1e3:.1f} kB"


def kl_text(value: float) -> str:
    """Return nats in three figures; the smallest are powers of ten, and not nothing."""
    return f"{value:.3g}"


def percent_text(value: Interval) -> str:
    """Print a fraction and its interval in percent."""
    return f"{value.value * 100:.2f}% [{value.low * 100:.2f}, {value.high * 100:.2f}]"
