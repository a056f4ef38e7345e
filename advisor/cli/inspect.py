"""``advisor inspect``: what an already quantized checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded
from advisor.cli.progress import progress

_SHOWN = 20


@guarded
def command(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint's folder, or a GGUF file.")
    ],
    gpu: opt.Gpu = "auto",
    engine: opt.Engine = "auto",
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Say what a checkpoint is: scheme per module, size, bits per weight, faults, kernels."""
    from advisor import workflows

    with progress() as callback:
        result = workflows.inspect(path, gpu=gpu, engine=engine, progress=callback)
    output.show(result.to_dict(), _render)
    raise typer.Exit(1 if result.faults else 0)


def _render(console: Any, document: dict[str, Any]) -> None:
    console.print(
        f"[bold]{document['path']}[/]: {document['format']}, {document['architecture']}, "
        f"{output.size(document['size_bytes'])}, {document['bits_per_weight']:.3f} bits per weight"
    )
    table = output.table("scheme", "modules", "weights", "kernel", right=(1, 2))
    for row in document["schemes"]:
        table.add_row(row["name"], str(row["modules"]), f"{row['parameters']:,}", row["kernel"])
    console.print(table)
    if document["outer"]:
        ends = ", ".join(f"{name} {kind}" for name, kind in document["outer"].items())
        console.print(f"Embedding and head: {ends}.", soft_wrap=True)
    for fault in document["faults"][:_SHOWN]:
        console.print(f"[red]fault:[/] {fault}", soft_wrap=True)
    if (more := len(document["faults"]) - _SHOWN) > 0:
        console.print(f"[red]...[/] and {more} more; --json lists them all")
    for refusal in document["refusals"]:
        console.print(f"[red]refused:[/] {refusal}", soft_wrap=True)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
