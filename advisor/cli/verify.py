"""``advisor verify``: is a checkpoint what its plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded
from advisor.cli.progress import progress


@guarded
def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="The plan.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The checkpoint.")],
    model: Annotated[
        str, typer.Option("--model", help="Where the 16-bit model is now, if it has moved.")
    ] = "",
    device: opt.Device = "auto",
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Re-read the files, compare every module with the plan, and measure again.

    Exit code 1 when the checkpoint is not what the plan says.
    """
    from advisor import workflows

    with progress() as callback:
        result = workflows.verify(
            plan, folder, model=model or None, device=device, progress=callback
        )
    output.show(result.to_dict(), _render)
    raise typer.Exit(0 if result.passed else 1)


def _render(console: Any, document: dict[str, Any]) -> None:
    for check in document["checks"]:
        mark = "[green]ok[/]  " if check["passed"] else "[red]FAIL[/]"
        console.print(f"{mark} {check['name']}: {check['detail']}", soft_wrap=True)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/] {warning}", soft_wrap=True)
    output.computed_on(console, document["computed_on"])
    verdict = (
        "[bold green]verified[/]" if document["passed"] else "[bold red]NOT what the plan says[/]"
    )
    console.print(f"{document['folder']}: {verdict}")
