"""``advisor tune``: search, measure, and write the plan."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded
from advisor.cli.progress import progress
from advisor.plan.hashing import is_hub_id


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
    out: Annotated[Path, typer.Option("-o", "--output", help="Plan to write.")] = Path("plan.yaml"),
    calibration: opt.CalibrationText = [],  # noqa: B006 - Typer copies defaults
    evaluation: opt.EvaluationText = [],  # noqa: B006
    slices: opt.Slices = [],  # noqa: B006
    samples: opt.TuneSamples = None,
    sequence_length: opt.SequenceLength = 256,
    evaluation_sequences: opt.TuneEvaluationSequences = None,
    trials: opt.Trials = 60,
    time_budget: opt.TimeBudget = None,
    seed: opt.Seed = 0,
    storage: opt.Storage = None,
    sampler: opt.Sampler = "tpe",
    effort: opt.Effort = "full",
    sequential: opt.Sequential = True,
    backends: opt.Backends = [],  # noqa: B006
    max_disk: opt.MaxDisk = None,
    device: opt.Device = "auto",
    quantize_head: opt.QuantizeHead = False,
    quantize_embedding: opt.QuantizeEmbedding = False,
    profiles: opt.Profiles = [],  # noqa: B006
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Search schemes and per-module bit widths, measure the finalists, write the plan.

    Ctrl-C keeps the best so far, if any was measured yet; the same command goes on where it
    stopped. Exit code 3: nothing measured meets the budgets.
    """
    from advisor import workflows

    budgets = {
        "max_size": max_size, "max_memory": max_memory, "max_loss": max_loss, "max_kl": max_kl,
        "max_accuracy_drop": max_accuracy_drop, "task": task, "min_speed": min_speed,
    }  # fmt: skip
    with progress() as callback:
        result = workflows.tune(
            model, gpu=gpu, engine=engine, budgets=budgets, context=context, batch=batch,
            prefer=prefer, output=out, calibration=calibration, evaluation=evaluation,
            slices=slices, samples=samples, sequence_length=sequence_length,
            evaluation_sequences=evaluation_sequences, trials=trials, time_budget=time_budget,
            seed=seed, storage=storage, sequential=sequential, sampler=sampler, effort=effort,
            backends=backends, max_disk=max_disk, quantize_head=quantize_head,
            quantize_embedding=quantize_embedding, device=device, progress=callback,
        )  # fmt: skip
    document = result.to_dict()
    output.show(document, functools.partial(render, model=model))
    raise typer.Exit(0 if document["feasible"] else 3)


_COLUMNS = ("candidate", "by", "size", "bits", "KL, 95%", "loss, 95%", "top-1", "verdict")
_DROPPED = ("bits", "top-1")
"""Columns that a narrow terminal goes without, in this order."""


def apply_command(document: dict[str, Any], model: str) -> str:
    """Return the command that follows.

    Args:
        document: What ``tune --json`` prints.
        model: What was named. A folder that the plan calls by its Hugging Face id may be a
            download outside of the usual cache, where the id alone does not find it again.
    """
    parts = ["advisor", "apply", document["plan_path"], "-o", "quantized/"]
    if model and Path(model).is_dir() and is_hub_id(document["plan"]["model"]["id"]):
        parts += ["--model", model]
    return shlex.join(parts)


def render(console: Any, document: dict[str, Any], *, model: str = "") -> None:
    """Draw the measured finalists, the answer and the next command.

    Args:
        console: Where to.
        document: What ``tune --json`` prints.
        model: The folder that was named, which the plan may call by its Hugging Face id.
    """
    _finalists(console, document["finalists"], document["plan"]["budgets"]["max_size_bytes"])
    _judged_apart(console, document["finalists"])
    for failure in document["backends_failed"]:
        console.print(
            f"[yellow]{failure['backend']}[/] made no candidate: {failure['reason']}",
            soft_wrap=True,
        )
    output.print_notes(console, document)
    search = document["search"]
    console.print(
        f"\n{search['trials']} trials scored, {len(document['finalists'])} measured on held-out "
        f"text in {output.duration(document['seconds'])}"
        + ("" if search["stopped"] == "completed" else f" ({search['stopped']}: best so far)")
    )
    output.computed_on(console, document["computed_on"])
    if differing := (document["plan"]["calibration_fit"] or {}).get("warnings"):
        console.print(
            f"[yellow]Texts differ:[/] {'; '.join(differing)}. Codes were fitted to the "
            "calibration text, and the figures above are of the evaluation text: give both text "
            "like what the model will serve (--calibration, --evaluation).",
            soft_wrap=True,
        )
    if ends := document["plan"]["scheme"]["outer"]:
        listed = ", ".join(f"{name} {scheme}" for name, scheme in ends.items())
        console.print(f"Embedding and head: {listed}.", soft_wrap=True)
    for line in _otherwise(document["plan"]):
        console.print(line, soft_wrap=True)
    if document["feasible"]:
        console.print(f"\n[bold]{document['chosen']}[/] is {document['why']}.", soft_wrap=True)
        console.print(f"[bold]Plan[/]   {document['plan_path']}", soft_wrap=True)
        console.print(f"[bold]Apply[/]  {apply_command(document, model)}", soft_wrap=True)
        return
    if search["stopped"] == "interrupted":
        console.print(
            "[bold red]Nothing measured so far meets these budgets.[/] "
            "The same command goes on where it stopped."
        )
    else:
        console.print("[bold red]Nothing measured meets these budgets.[/]")
    if document["relaxation"]:
        console.print("The smallest changes that would do:")
    for change in document["relaxation"]:
        console.print(f"  - {change['text']}", soft_wrap=True)
    unmet = document["plan"]["unmet"]
    console.print(
        f"The nearest, [bold]{document['chosen']}[/], is in {document['plan_path']}"
        + (f": {unmet}." if unmet else "."),
        soft_wrap=True,
    )


def _finalists(console: Any, finalists: list[dict[str, Any]], max_bytes: int | None = None) -> None:
    """Draw the finalists, if any, in as many columns as the terminal has room for."""
    if not finalists:
        return
    shown = [
        {
            "candidate": row["name"],
            "by": _by(row),
            "size": output.size(row["size_bytes"]),
            "bits": f"{row['bits_per_weight']:.2f}",
            "KL, 95%": output.interval(row["kl"], middle="value", kind="number"),
            "loss, 95%": output.interval(row["loss"], middle="value"),
            "top-1": output.percent((row["top1_agreement"] or {}).get("value")),
            "verdict": "too large"
            if max_bytes is not None and row["size_bytes"] > max_bytes
            else row["verdict"],
        }
        for row in finalists
    ]
    columns = output.fitting_columns(_COLUMNS, shown, console.width - 3, dropped=_DROPPED)
    right = [index + 1 for index, name in enumerate(columns) if name in ("size", "bits")]
    table = output.table("", *columns, right=right)
    for row, cells in zip(finalists, shown, strict=True):
        table.add_row(
            "[green]>[/]" if row["chosen"] else "",
            *(cells[name] for name in columns),
            style="bold" if row["chosen"] else "",
        )
    console.print(table)


def _by(row: dict[str, Any]) -> str:
    """Say who makes a candidate: its name may repeat."""
    own = str(row["method"]) + (", sequential" if row["sequential"] else "")
    return str(row["backend"] or own)


def _otherwise(plan: dict[str, Any]) -> list[str]:
    """Say what did not get what the other modules got."""
    lines = [
        f"[yellow]Shapes[/] {row['modules']} modules are {row['scheme']}: {row['reason']} "
        f"(first: {row['first']})."
        for row in plan["fallbacks"]
    ]
    seen = plan["expert_coverage"]
    if seen and seen["helped"]:
        lines.append(
            f"[yellow]Experts[/] {seen['helped']} of {seen['experts']} saw too few calibration "
            f"tokens (median {seen['median_tokens']}, {seen['unseen']} saw none) and were fitted "
            "with the help of their layer's average inputs: more --samples would cover them."
        )
    return lines


def _judged_apart(console: Any, finalists: list[dict[str, Any]]) -> None:
    """Draw what further texts and the benchmark say of each candidate, where there are any."""
    rows = [row for row in finalists if row["slices"] or row["accuracy"]]
    if not rows:
        return
    names = list(rows[0]["slices"])
    task = (rows[0]["accuracy"] or {}).get("task")
    heads = [f"loss on {name}, 95%" for name in names]
    heads += [] if task is None else [f"accuracy on {task}", "drop, 95%"]
    table = output.table("", "candidate", "by", *heads)
    for row in rows:
        cells = [output.interval(row["slices"][name]["loss"], middle="value") for name in names]
        if (found := row["accuracy"]) is not None:
            cells += [
                f"{output.percent(found['value'])} (16-bit {output.percent(found['reference'])})",
                output.interval(found["drop"], middle="value"),
            ]
        mark = "[green]>[/]" if row["chosen"] else ""
        table.add_row(mark, row["name"], _by(row), *cells, style="bold" if row["chosen"] else "")
    console.print(table)
