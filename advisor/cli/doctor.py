"""``advisor doctor``: what works in this environment, and why the rest does not."""

from __future__ import annotations

from typing import Any

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(json: opt.Json = False, verbose: opt.Verbose = False, debug: opt.Debug = False) -> None:
    """Say which libraries, formats and devices work here, why others do not, what to install."""
    from advisor import workflows

    output.show(workflows.doctor().to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    console.print(f"Python {document['python']}, {document['platform']}")
    table = output.table("", "library", "version", "what for")
    for row in document["libraries"]:
        mark = "[green]ok[/]" if row["works"] else "[red]no[/]"
        missing = row["problem"] == "not installed"
        note = row["purpose"]
        if not row["works"] and not missing:
            note = f"{note}: {row['problem']}"
        version = row["version"] or ("missing" if missing else "")
        table.add_row(mark, row["name"], version, note)
    console.print(table)
    console.print()
    devices = document["machine"]
    for gpu in devices["gpus"]:
        console.print(f"[green]GPU[/] {gpu['name']}")
    for problem in devices["problems"]:
        console.print(f"[yellow]GPU[/] {problem}")
    console.print(f"[green]CPU[/] {devices['cpu']['name']}")
    for step in document["next_steps"]:
        console.print(f"  - {step}")
