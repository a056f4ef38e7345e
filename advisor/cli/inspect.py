"""``advisor inspect``: what an already quantized checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint's folder.")],
    gpu: opt.Gpu = "auto",
    engine: opt.Engine = "auto",
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Say what a checkpoint is: scheme per module, size, bits per weight, faults, kernels."""
    from advisor import workflows

    result = workflows.inspect(path, gpu=gpu, engine=engine)
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
    for fault in document["faults"]:
        console.print(f"[red]fault:[/] {fault}", soft_wrap=True)
