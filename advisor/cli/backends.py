"""``advisor backends``: other libraries, each in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded

app = typer.Typer(no_args_is_help=True, help="Other libraries, each in an environment of its own.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="One of advisor backends list.")]

Python = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--python", metavar="EXECUTABLE",
                 help="Interpreter of the environment, as python3.11. Default: this one's."),
]  # fmt: skip
Wheels = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--wheels", metavar="DIR",
                 help="Install from the wheels in this folder alone, without a network."),
]  # fmt: skip
SchemeName = Annotated[
    str, typer.Option("--scheme", metavar="NAME", help="What to make, as gptq-int4-g64-sym.")
]
Out = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to make the checkpoint in.")
]
Settings = Annotated[
    list[str],
    typer.Option("--setting", metavar="NAME=VALUE",
                 help="A setting of the library itself, as damp_percent=0.01. Repeatable."),
]  # fmt: skip
Device = Annotated[
    str, typer.Option("--device", metavar="NAME", help="Where it runs: auto, cpu or cuda.")
]
Timeout = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--timeout", metavar="TIME", help="End it after this long (90s, 10m, 2h)."),
]  # fmt: skip


@app.command("list")
@guarded
def list_(json: opt.Json = False, verbose: opt.Verbose = False, debug: opt.Debug = False) -> None:
    """List the backends, what each makes, and whether it is installed."""
    from advisor import workflows

    output.show(workflows.list_backends(), _render_list)


@app.command()
@guarded
def install(
    name: Name,
    python: Python = None,
    wheels: Wheels = None,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Create the backend's environment from its lock file: every package pinned and hashed."""
    from advisor import workflows
    from advisor.cli.progress import progress

    with progress() as callback:
        document = workflows.install_backend(name, python=python, wheels=wheels, progress=callback)
    output.show(document, _render_one)


@app.command()
@guarded
def run(
    name: Name,
    model: opt.Model,
    scheme: SchemeName,
    output_folder: Out,
    setting: Settings = [],  # noqa: B006
    device: Device = "auto",
    timeout: Timeout = None,
    gpu: opt.Gpu = "auto",
    engine: opt.Engine = "auto",
    calibration: opt.CalibrationText = [],  # noqa: B006
    evaluation: opt.EvaluationText = [],  # noqa: B006
    samples: opt.Samples = 32,
    sequence_length: opt.SequenceLength = 256,
    evaluation_sequences: opt.EvaluationSequences = 32,
    seed: opt.Seed = 0,
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Have another library quantize a model on our tokens, and measure the result as our own.

    The folder also holds a plan: advisor apply makes the checkpoint again, advisor verify checks
    it. Ctrl-C ends the library's process.
    """
    from advisor import workflows
    from advisor.cli.progress import progress

    with progress() as callback:
        found = workflows.run_backend(
            name, model, scheme, output_folder, settings=setting, device=device, timeout=timeout,
            gpu=gpu, engine=engine, calibration=calibration, evaluation=evaluation,
            samples=samples, sequence_length=sequence_length,
            evaluation_sequences=evaluation_sequences, seed=seed, progress=callback,
        )  # fmt: skip
    output.show(found.to_dict(), _render_run)


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


def _render_run(console: Any, document: dict[str, Any]) -> None:
    memory = document["peak_memory_bytes"]
    lines = (
        f"[bold]{document['name']}[/] by {document['backend']} {document['version']}, "
        f"as {document['format']}: {output.size(document['size_bytes'])}, "
        f"{document['bits_per_weight']:.2f} bits per weight",
        f"  KL     {output.interval(document['kl'], middle='value', kind='number')}",
        f"  loss   {output.interval(document['loss'], middle='value')}",
        f"  top-1  {output.interval(document['top1_agreement'], middle='value')}",
        f"  took   {output.duration(document['seconds'])}, "
        f"{output.size(memory)} of memory at its peak",
        *(f"  note   {note}" for note in document["notes"]),
        f"Check it: advisor verify {document['plan']} {document['output']}",
    )
    for line in lines:
        console.print(line, soft_wrap=True)
