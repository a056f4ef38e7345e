"""``advisor report``: one page to send to a colleague."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan made by advisor tune.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path(
        "report.html"
    ),
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FOLDER", help="Also write every plot as a PNG file here."),
    ] = None,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Write one self-contained HTML page: the answer, why, what lost, and every hash."""
    from advisor import workflows

    result = workflows.report(plan, out, png=png)
    output.show(result.to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    for path in (document["output"], *document["images"]):
        console.print(path, soft_wrap=True)
