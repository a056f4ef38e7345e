"""``advisor recommend``: rank every scheme before anything is measured."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output, why_not
from advisor.cli.errors import guarded
from advisor.errors import InputError, join_errors


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
    quantize_head: opt.QuantizeHead = False,
    quantize_embedding: opt.QuantizeEmbedding = False,
    compare: Annotated[
        str, typer.Option("--compare", metavar="GPUS", help="Several GPUs side by side: l4,a10.")
    ] = "",
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a Markdown table for a ticket.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every scheme, not only the nearest.")
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

    _check_output(json=json, markdown=markdown, compare=compare, gpu=gpu, everything=everything)
    budgets = {
        "max_size": max_size, "max_memory": max_memory, "max_loss": max_loss, "max_kl": max_kl,
        "max_accuracy_drop": max_accuracy_drop, "task": task, "min_speed": min_speed,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "engine": engine, "budgets": budgets, "context": context, "batch": batch, "prefer": prefer,
        "quantize_head": quantize_head, "quantize_embedding": quantize_embedding,
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
        output.show(document, functools.partial(render, everything=everything))
    raise typer.Exit(0 if document["recommended"] else 3)


def _check_output(*, json: bool, markdown: bool, compare: str, gpu: str, everything: bool) -> None:
    """Refuse options that contradict each other, before one of them is passed over."""
    problems = []
    if json and markdown:
        problems.append("--json and --markdown both say what is printed: give one of them.")
    if compare and gpu != "auto":
        problems.append(
            f"--compare {compare} names the GPUs: leave out --gpu {gpu}, or add it there."
        )
    if compare and (markdown or everything):
        option = "--markdown" if markdown else "--all"
        problems.append(f"{option} is for one GPU: leave it out with --compare, or take --json.")
    if problems:
        raise InputError(join_errors(problems))


_COLUMNS = ("scheme", "format", "size", "memory", "loss, 90% range", "tok/s", "speedup", "kernel")
_DROPPED = ("format", "kernel", "memory", "speedup")
"""Columns that a narrow terminal goes without, in this order."""
_NUMBERS = ("size", "memory", "tok/s", "speedup")
_ROWS = 12
"""Fitting schemes shown unless --all asks for every one."""


def _cells(candidate: dict[str, Any]) -> dict[str, str]:
    kernel, speed = candidate["kernel"], candidate["decode_tokens_per_s"] or {}
    gain = candidate.get("speedup_over_16bit")
    expected = speed.get("expected")
    return {
        "scheme": candidate["name"],
        "format": candidate["format"] or "none",
        "size": output.size(candidate["size_bytes"]),
        "memory": output.size((candidate["memory_bytes"] or {}).get("total")),
        "loss, 90% range": output.short_interval(candidate["loss"], middle="expected"),
        "tok/s": "unknown" if expected is None else f"{expected:.0f}",
        "speedup": "unknown" if gain is None else f"{gain:.2f}x",
        "kernel": kernel["name"] or kernel["support"],
    }


def render(console: Any, document: dict[str, Any], *, everything: bool = False) -> None:
    """Draw the ranked table, the reason and what was ruled out."""
    ruled_out = [row for row in document["candidates"] if not row["feasible"]]
    model, hardware = document["model"], document["hardware"]
    console.print(
        f"[bold]{model['id']}[/] ({output.count(model['parameters'])} parameters) on "
        f"[bold]{output.device(hardware)}[/], served by [bold]{document['engine']}[/]\n"
    )
    output.print_notes(console, document)
    if document["recommended"]:
        _ranked(console, document, len(document["candidates"]) if everything else _ROWS)
        _ladder(console, document)
    else:
        _nothing_fits(console, document)
    if ruled_out:
        console.print("\n[bold]Why not[/]")
        why_not.render(console, ruled_out, everything=everything)
    console.print()
    if document["tune"]:
        console.print(f"[bold]Tune[/]   {document['tune']}", soft_wrap=True)
    if document["serve"]:
        console.print(f"[bold]Serve[/]  {document['serve']}", soft_wrap=True)
    measures = " `advisor tune` measures." if document["tune"] else ""
    console.print(
        "[dim]Size and memory are calculated, loss is published evidence, speed is modelled; "
        f"nothing here was measured on your machine.{measures}[/]"
    )


def render_short(console: Any, document: dict[str, Any]) -> None:
    """Draw the best five and the reason: what a page with more to say has room for."""
    if document["recommended"]:
        _ranked(console, document, 5)
    else:
        _nothing_fits(console, document)


def _ranked(console: Any, document: dict[str, Any], rows: int) -> None:
    """Draw the fitting candidates, best first, in as many columns as the terminal has room for."""
    feasible = [row for row in document["candidates"] if row["feasible"]]
    shown = [_cells(row) for row in feasible[:rows]]
    columns = output.fitting_columns(_COLUMNS, shown, console.width - 4, dropped=_DROPPED)
    right = [index + 1 for index, name in enumerate(columns) if name in _NUMBERS]
    table = output.table("", *columns, right=right)
    for cells in shown:
        chosen = cells["scheme"] == document["recommended"]
        table.add_row(
            "[green]>[/]" if chosen else "",
            *(cells[name] for name in columns),
            style="bold" if chosen else "",
        )
    console.print(table)
    if (count := document["hardware"]["count"]) > 1 and "memory" in columns:
        console.print(f"  [dim]memory: of each of {count} devices, which share the weights[/]")
    others = [row["name"] for row in feasible[:rows] if not row["tunable"]]
    if others and document["tune"]:  # where nothing is made here, `why` says who does
        console.print(f"  [dim]made with other software, so after the rest: {', '.join(others)}[/]")
    if rest := len(feasible) - len(shown):
        console.print(f"  [dim]and {rest} more that fit: advisor recommend ... --all[/]")
    if taking := [row["name"] for row in feasible if row["outer"]]:
        ends = " and ".join(next(row["outer"] for row in feasible if row["outer"]))
        console.print(
            f"\n[bold]Ends.[/] {ends} quantized too in {len(taking)} of {len(feasible)} that fit; "
            "what that costs in quality is not in the loss: `advisor tune` measures it."
        )
    if why := document.get("why"):
        console.print(f"\n[bold]Why {document['recommended']}.[/] {why}")
    bound = document.get("bound")
    if bound and bound not in (document.get("why") or ""):
        console.print(f"[bold]Bound.[/] On this workload {bound}.")


def _ladder(console: Any, document: dict[str, Any]) -> None:
    """Say the largest context and batch of the first candidates."""
    rungs = document.get("ladder") or []
    if not rungs:
        return
    each = " of each device" if document["hardware"]["count"] > 1 else ""
    console.print(f"\n[bold]Room[/] in {output.size(rungs[0]['limit_bytes'])} of memory{each}")
    width = max(len(rung["candidate"]) for rung in rungs)
    for rung in rungs:
        whole = " (all the model was made for)" if rung["whole_context"] else ""
        batch = rung["largest_batch_at_context"]
        more = f", or {'4096 or more' if batch >= 4096 else batch} of {rung['context']}"
        console.print(
            f"  {rung['candidate']:{width}}  one sequence of "
            f"{rung['largest_context_at_batch_1']} tokens{whole}{more if batch > 1 else ''}",
            highlight=False,
        )


def _nothing_fits(console: Any, document: dict[str, Any]) -> None:
    console.print("[bold red]Nothing fits these budgets.[/] The smallest changes that would do:")
    for change in document.get("relaxation") or []:
        console.print(f"  - {change['text']}")
    if not document.get("relaxation"):
        console.print("  none: no change of these budgets alone would do")


def _markdown(document: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(_COLUMNS) + " | fits |", "|" + " --- |" * (len(_COLUMNS) + 1)]
    for row in document["candidates"]:
        cells = _cells(row)
        if row["name"] == document["recommended"]:
            cells["scheme"] = f"**{row['name']}**"
        verdict = "yes" if row["feasible"] else why_not.one_line(row)
        texts = [text.replace("|", "\\|") for text in (*cells.values(), verdict)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _render_comparison(console: Any, document: dict[str, Any]) -> None:
    output.print_notes(console, document)
    shown = []
    for row in document["gpus"]:
        best = row["candidate"]
        cells = dict.fromkeys(_COLUMNS, "") if best is None else _cells(best)
        cells["scheme"] = cells["scheme"] or "nothing fits"
        shown.append({"GPU": output.device(row["hardware"])} | cells)
    columns = output.fitting_columns(("GPU", *_COLUMNS), shown, console.width, dropped=_DROPPED)
    right = [index for index, name in enumerate(columns) if name in _NUMBERS]
    table = output.table(*columns, right=right)
    for cells in shown:
        table.add_row(*(cells[name] for name in columns))
    console.print(table)
    for row in document["gpus"]:
        for change in row["relaxation"] or []:
            console.print(f"{output.device(row['hardware'])}: {change['text']}")
