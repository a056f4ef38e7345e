"""``advisor profiles``: the catalogue of hardware, models and engines, and one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded

app = typer.Typer(no_args_is_help=True, help="The catalogue of hardware, models and engines.")
Kind = Annotated[
    str, typer.Argument(metavar="KIND", help="hardware, models, engines, or all of them.")
]


@app.command("list")
@guarded
def list_(
    kind: Kind = "all",
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """List what the catalogue knows."""
    from advisor import workflows

    output.show(workflows.list_profiles(kind), _render_list)


@app.command()
@guarded
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A GPU, a model or an engine.")],
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Show one profile with the source of every figure."""
    from advisor import workflows

    output.show(workflows.show_profile(name), _render_one)


@app.command()
@guarded
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of profiles.")],
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Check a folder of profiles of your own: every fault at once. Exit code 2 on a fault."""
    from advisor import workflows

    document = workflows.check_profiles(folder)
    output.show(document, _render_check)
    raise typer.Exit(2 if document["faults"] else 0)


def _render_list(console: Any, document: dict[str, Any]) -> None:
    for kind in ("hardware", "models", "engines"):
        rows = document.get(kind)
        if rows:
            table = output.table(kind, "", "")
            for row in rows:
                parameters = row.get("parameters")
                known = "" if parameters is None else f"{output.count(parameters)} parameters"
                table.add_row(row["id"], row["name"], known or row["note"])
            console.print(table)


def _render_one(console: Any, document: dict[str, Any]) -> None:
    import yaml

    console.print(f"[bold]{document['kind']}[/] {document['path']}", soft_wrap=True)
    text = yaml.safe_dump(document["profile"], sort_keys=False, allow_unicode=True, width=1000)
    console.print(text, markup=False, soft_wrap=True, end="")


def _render_check(console: Any, document: dict[str, Any]) -> None:
    for fault in document["faults"]:
        console.print(f"[red]fault:[/] {fault}", soft_wrap=True)
    console.print(f"{document['checked']} profile(s) checked, {len(document['faults'])} fault(s)")
