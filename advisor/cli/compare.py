"""``advisor compare``: how far two checkpoints differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded
from advisor.cli.progress import progress

_Text = Annotated[
    list[str],
    typer.Option("--evaluation", rich_help_panel="Texts", metavar="PATH",
                 help="Text to compare on: files, folders, JSONL, hf:NAME[:CONFIG[:SPLIT]]. "
                 "Default: builtin:evaluation."),
]  # fmt: skip
_Sequences = Annotated[
    int,
    typer.Option("--evaluation-sequences", min=4, rich_help_panel="Texts",
                 help="Sequences to compare on."),
]  # fmt: skip


@guarded
def command(
    reference: Annotated[Path, typer.Argument(metavar="A", help="The reference, usually 16-bit.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="The one that is judged.")],
    evaluation: _Text = [],  # noqa: B006 - Typer copies defaults
    sequences: _Sequences = 16,
    sequence_length: opt.SequenceLength = 256,
    device: opt.Device = "auto",
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Measure KL(A || B), perplexity and top-1 agreement on one text, and the error by module."""
    from advisor import workflows

    with progress() as callback:
        result = workflows.compare(
            reference, other, evaluation=evaluation, evaluation_sequences=sequences,
            sequence_length=sequence_length, device=device, progress=callback,
        )  # fmt: skip
    output.show(result.to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    table = output.table("", "A", "B")
    table.add_row("checkpoint", document["reference"], document["other"])
    table.add_row("bytes", *(output.size(value) for value in document["size_bytes"]))
    table.add_row(
        "perplexity",
        *(
            output.interval(part, middle="value", kind="number")
            for part in document["perplexity_intervals"]
        ),
    )
    console.print(table)
    console.print(
        f"\nKL {output.interval(document['kl'], middle='value', kind='number')} nats per token, "
        f"loss {output.interval(document['loss'], middle='value')}, "
        f"top-1 agreement {output.interval(document['top1_agreement'], middle='value')} "
        f"(95% intervals, {document['sequences']} sequences of {document['sequence_length']})"
    )
    output.computed_on(console, document["computed_on"])
    if document["modules"]:
        console.print("\n[bold]Largest relative weight errors[/]")
        for row in document["modules"][:10]:
            console.print(f"  {row['relative_error']:.4f}  {row['scheme']:<24} {row['name']}")
