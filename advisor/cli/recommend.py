"""``advisor recommend``: rank every scheme before anything is measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(
    model: opt.Model,
    gpu: opt.Gpu = "auto",
    engine: opt.Engine = "auto",
    max_size: opt.MaxSize = None,
    max_memory: opt.MaxMemory = None,
    max_loss: opt.MaxLoss = None,
    max_kl: opt.MaxKl = None,
    max_accuracy_drop: opt.MaxAccuracyDrop = None,
    task: opt.Task = None,
    min_speed: opt.MinSpeed = None,
    context: opt.Context = 4096,
    batch: opt.Batch = 1,
    prefer: opt.Prefer = "balanced",
    compare: Annotated[
        str, typer.Option("--compare", metavar="GPUS", help="Several GPUs side by side: l4,a10.")
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table for a ticket.")
    ] = False,
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Rank every scheme for a model on a GPU, from arithmetic and published evidence.

    Reads only config.json and the headers of the weights, needs no network for a local model or
    one of the catalogue, and answers in well under a second. Exit code 3: nothing fits.
    """
    from advisor import workflows
    from advisor.budgets import Budgets

    budgets = Budgets.from_text(
        max_size=max_size, max_memory=max_memory, max_loss=max_loss, max_kl=max_kl,
        max_accuracy_drop=max_accuracy_drop, task=task, min_speed=min_speed,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "engine": engine, "budgets": budgets, "context": context, "batch": batch, "prefer": prefer,
    }  # fmt: skip
    if compare:
        names = [name.strip() for name in compare.split(",") if name.strip()]
        document = workflows.compare_gpus(model, names, **settings)
        output.show(document, _render_comparison)
        raise typer.Exit(0 if any(row["recommended"] for row in document["gpus"]) else 3)
    document = workflows.recommend(model, gpu=gpu, **settings).to_dict()
    if markdown:
        typer.echo(_markdown(document))
    else:
        output.show(document, render)
    raise typer.Exit(0 if document["recommended"] else 3)


_HEADINGS = (
    "",
    "scheme",
    "format",
    "size",
    "memory",
    "loss, 90% range",
    "tok/s",
    "vs 16-bit",
    "kernel",
)


def _cells(candidate: dict[str, Any]) -> tuple[str, ...]:
    kernel = candidate["kernel"]
    gain = candidate.get("speedup_over_16bit")
    return (
        candidate["name"],
        candidate["format"],
        output.size(candidate["size_bytes"]),
        output.size((candidate["memory_bytes"] or {}).get("total")),
        output.interval(candidate["loss"], middle="expected"),
        output.speed(candidate["decode_tokens_per_s"]),
        "unknown" if gain is None else f"{gain:.2f}x",
        kernel["name"] or kernel["support"],
    )


def render(console: Any, document: dict[str, Any]) -> None:
    """Draw the ranked table, the reason and what was ruled out."""
    feasible = [row for row in document["candidates"] if row["feasible"]]
    ruled_out = [row for row in document["candidates"] if not row["feasible"]]
    model, hardware = document["model"], document["hardware"]
    console.print(
        f"[bold]{model['id']}[/] ({model['parameters'] / 1e9:.3g} B parameters) on "
        f"[bold]{hardware['name']}[/], served by [bold]{document['engine']}[/]"
    )
    if feasible:
        table = output.table(*_HEADINGS, right=(3, 4, 6, 7))
        for row in feasible:
            chosen = row["name"] == document["recommended"]
            table.add_row(
                "[green]>[/]" if chosen else "", *_cells(row), style="bold" if chosen else ""
            )
        console.print(table)
        if why := document.get("why"):
            console.print(f"\n[bold]Why {document['recommended']}.[/] {why}")
    else:
        console.print(
            "\n[bold red]Nothing fits these budgets.[/] The smallest changes that would do:"
        )
        for change in document.get("relaxation") or []:
            console.print(f"  - {describe_relaxation(change)}")
    if ruled_out:
        console.print("\n[bold]Why not[/]")
        for row in ruled_out:
            console.print(f"  [dim]{row['name']:<28}[/] {_reason(row)}")
    if document.get("serve"):
        console.print(f"\n[bold]Tune[/]   {document.get('tune', '')}", soft_wrap=True)
        console.print(f"[bold]Serve[/]  {document['serve']}", soft_wrap=True)
    console.print(
        "\n[dim]Size and memory are calculated, loss is published evidence, speed is modelled; "
        "nothing here was measured on your machine. `advisor tune` measures.[/]"
    )


def _reason(candidate: dict[str, Any]) -> str:
    if candidate["kernel"]["support"] == "none":
        return str(candidate["kernel"]["reason"])
    parts = []
    for violation in candidate["violations"]:
        budget = violation["budget"]
        parts.append(
            f"{budget.replace('_', ' ')} {_amount(budget, violation['value'])} "
            f"over {_amount(budget, violation['limit'])}"
            if budget != "min_speed"
            else f"{violation['value']:.0f} tok/s, below {violation['limit']:.0f}"
        )
    return "; ".join(parts) or str(candidate["kernel"]["reason"])


def _amount(budget: str, value: float | None) -> str:
    if budget in ("max_size", "max_memory"):
        return output.size(value)
    if budget in ("max_loss", "max_accuracy_drop"):
        return output.percent(value)
    return "unknown" if value is None else f"{value:g}"


def describe_relaxation(change: dict[str, Any]) -> str:
    """Say one relaxation in words."""
    if text := change.get("text"):
        return str(text)
    budget = change["budget"]
    return (
        f"{budget.replace('_', ' ')} {_amount(budget, change['to'])} instead of "
        f"{_amount(budget, change['from'])} ({change['candidate']})"
    )


def _markdown(document: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(_HEADINGS[1:]) + " | fits |", "|" + " --- |" * len(_HEADINGS)]
    for row in document["candidates"]:
        name, *rest = _cells(row)
        mark = f"**{name}**" if name == document["recommended"] else name
        verdict = "yes" if row["feasible"] else _reason(row).replace("|", "\\|")
        lines.append("| " + " | ".join([mark, *rest, verdict]) + " |")
    return "\n".join(lines)


def _render_comparison(console: Any, document: dict[str, Any]) -> None:
    table = output.table("GPU", "scheme", "size", "memory", "loss, 90% range", "tok/s", "kernel")
    for row in document["gpus"]:
        best = row["candidate"]
        if best is None:
            table.add_row(row["hardware"]["name"], "nothing fits", *[""] * 5)
            continue
        name, _, size, memory, loss, speed, _, kernel = _cells(best)
        table.add_row(row["hardware"]["name"], name, size, memory, loss, speed, kernel)
    console.print(table)
