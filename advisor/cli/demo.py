"""``advisor demo``: the whole journey on a small model that comes along."""

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
    folder: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the plan and the checkpoint.")
    ] = Path("advisor-demo"),
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Profile this machine, recommend, tune, apply and verify: half a minute on two cores."""
    from advisor import workflows

    with progress() as callback:
        result = workflows.demo(folder, progress=callback)
    output.show(result.to_dict(), _render)
    raise typer.Exit(0 if result.passed else 1)


def _render(console: Any, document: dict[str, Any]) -> None:
    from advisor.cli import recommend, tune

    console.rule("1. This machine", align="left")
    for line in document["machine"]:
        console.print(line, soft_wrap=True)
    console.rule("2. Recommended before measuring", align="left")
    recommend.render_short(console, document["recommendation"])
    console.rule("3. Tuned and measured", align="left")
    tune.render(console, document["tuning"])
    console.rule("4. Applied and verified", align="left")
    for check in document["verification"]["checks"]:
        mark = "[green]ok[/]" if check["passed"] else "[red]FAIL[/]"
        console.print(f"{mark} {check['name']}: {check['detail']}", soft_wrap=True)
    console.rule("Where everything is", align="left")
    for label, path in document["files"].items():
        console.print(f"  {label:<12} {path}", soft_wrap=True)
    console.print(f"\nThe whole journey took {output.duration(document['seconds'])}.")
