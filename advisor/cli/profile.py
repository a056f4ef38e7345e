"""``advisor profile``: what this machine is, and what it can run natively."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(
    gpu: opt.Gpu = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Time bandwidth and matrix products (seconds).")
    ] = False,
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Detect GPUs and CPU: memory, instruction sets, and which number formats run natively."""
    from advisor import workflows

    output.show(workflows.profile(gpu=gpu, measure=measure).to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    for problem in document["problems"]:
        console.print(f"[yellow]{problem}[/]", soft_wrap=True)
    for device in document["devices"]:
        console.print(f"\n[bold]{device['name']}[/]")
        for label, value in device["facts"]:
            console.print(f"  {label:<22} {value}", soft_wrap=True)
        for name, native in device["capabilities"].items():
            mark = "[green]yes[/]" if native else "[dim]no[/] " if native is False else "unknown"
            console.print(f"  {name.replace('_', ' '):<22} {mark}")
    if measured := document.get("measured"):
        table = output.table("", "measured", "table", "unit", right=(1, 2))
        for row in measured["rows"]:
            figure = "-" if row["measured"] is None else f"{row['measured']:.1f}"
            known = "unknown" if row["table"] is None else f"{row['table']:.1f}"
            table.add_row(
                row["name"], figure, known, row["unit"] if row["measured"] else row["problem"]
            )
        console.print(table)
