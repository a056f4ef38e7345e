"""``advisor backends``: other libraries, each in an environment of its own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded

app = typer.Typer(no_args_is_help=True, help="Other libraries, each in an environment of its own.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="One of advisor backends list.")]


@app.command("list")
@guarded
def list_(json: opt.Json = False, verbose: opt.Verbose = False, debug: opt.Debug = False) -> None:
    """List the backends, what each makes, and whether it is installed."""
    from advisor import workflows

    output.show(workflows.list_backends(), _render_list)


@app.command()
@guarded
def install(
    name: Name, json: opt.Json = False, verbose: opt.Verbose = False, debug: opt.Debug = False
) -> None:
    """Create the backend's environment from its pinned requirements."""
    from advisor import workflows
    from advisor.cli.progress import progress

    with progress() as callback:
        document = workflows.install_backend(name, progress=callback)
    output.show(document, _render_one)


@app.command()
@guarded
def check(
    name: Name, json: opt.Json = False, verbose: opt.Verbose = False, debug: opt.Debug = False
) -> None:
    """Say whether the backend imports and could run here. Exit code 1 if not."""
    from advisor import workflows

    document = workflows.check_backend(name)
    output.show(document, _render_one)
    raise typer.Exit(0 if document["works"] else 1)


def _render_list(console: Any, document: dict[str, Any]) -> None:
    table = output.table("backend", "makes", "installed", "needs")
    for row in document["backends"]:
        table.add_row(row["name"], ", ".join(row["makes"]), row["version"] or "no", row["needs"])
    console.print(table)


def _render_one(console: Any, document: dict[str, Any]) -> None:
    mark = "[green]works[/]" if document["works"] else f"[red]no:[/] {document['problem']}"
    console.print(f"[bold]{document['name']}[/] {document['version'] or ''} {mark}", soft_wrap=True)
