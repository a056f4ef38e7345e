"""``advisor apply``: make the checkpoint that a plan describes."""

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

_MaxShardSize = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Split a larger checkpoint into files of at most this size.",
    ),
]


@guarded
def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by advisor tune.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="Folder to create.")],
    model: Annotated[
        str, typer.Option("--model", help="Where the model is now, if the plan's id has moved.")
    ] = "",
    max_shard_size: _MaxShardSize = "5GB",
    device: opt.Device = "auto",
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Quantize as the plan says. The same plan gives the same bytes."""
    from advisor import workflows
    from advisor.budgets import parse_size

    shard = parse_size(max_shard_size, option="--max-shard-size")
    with progress() as callback:
        result = workflows.apply(
            plan, out, model=model or None, max_shard_bytes=shard, device=device,
            progress=callback,
        )  # fmt: skip
    output.show(result.to_dict(), functools.partial(_render, model=model))


def _render(console: Any, document: dict[str, Any], *, model: str) -> None:
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}")
    console.print(
        f"[bold]{document['output']}[/]: {document['scheme']} as {document['format']}, "
        f"{output.size(document['size_bytes'])} in {len(document['files'])} tensor file(s), "
        f"{document['quantized_modules']} modules quantized"
    )
    output.computed_on(console, document["computed_on"])
    where = ["--model", model] if model else []
    command = shlex.join(["advisor", "verify", document["plan"], document["output"], *where])
    console.print(f"[bold]Verify[/] {command}", soft_wrap=True)
    if document["serve"]:
        console.print(f"[bold]Serve[/]  {document['serve']}", soft_wrap=True)
