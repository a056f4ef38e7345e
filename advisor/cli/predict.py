"""``advisor predict``: size, memory, speed and loss of one scheme, feasible or not."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from advisor.cli import options as opt
from advisor.cli import output
from advisor.cli.errors import guarded


@guarded
def command(
    model: opt.Model,
    scheme: Annotated[
        str, typer.Option("--scheme", metavar="NAME", help="For example gptq-int4-g128-sym.")
    ],
    gpu: opt.Gpu = "auto",
    engine: opt.Engine = "auto",
    context: opt.Context = 4096,
    batch: opt.Batch = 1,
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Predict one scheme: size exactly, memory, speed and loss as intervals, and its kernel."""
    from advisor import workflows

    result = workflows.predict(model, scheme, gpu=gpu, engine=engine, context=context, batch=batch)
    output.show(result.to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    candidate = document["candidate"]
    kernel, memory, cost = (
        candidate["kernel"], candidate["memory_bytes"] or {}, candidate["quantization_cost"] or {}
    )  # fmt: skip
    console.print(
        f"[bold]{candidate['name']}[/] of [bold]{document['model']['id']}[/] on "
        f"[bold]{document['hardware']['name']}[/], served by [bold]{document['engine']}[/]"
    )
    table = output.table("", "", "how it is known")
    bits = f"{candidate['bits_per_weight']:.2f} bits per weight"
    table.add_row("size", f"{output.size(candidate['size_bytes'])}, {bits}", "calculated")
    parts = ", ".join(
        f"{key.replace('_', ' ')} {output.size(memory.get(key))}"
        for key in ("weights", "kv_cache", "activations", "overhead")
    )
    table.add_row("memory", f"{output.size(memory.get('total'))}: {parts}", "calculated")
    loss = candidate["loss"] or {}
    sources = ", ".join(loss.get("sources", ())[:2])
    table.add_row(
        "loss", output.interval(loss, middle="expected"), f"{loss.get('basis')}: {sources}"
    )
    table.add_row("decode tok/s", output.speed(candidate["decode_tokens_per_s"]), "modelled")
    table.add_row("prefill tok/s", output.speed(candidate["prefill_tokens_per_s"]), "modelled")
    gain = candidate["speedup_over_16bit"]
    table.add_row("over 16-bit", "unknown" if gain is None else f"{gain:.2f}x", "modelled")
    table.add_row("kernel", f"{kernel['support']}: {kernel['name'] or ''}", kernel["source"] or "")
    if cost.get("minutes") is not None:
        peak = output.size(cost.get("peak_memory_bytes"))
        table.add_row("quantizing", f"{cost['minutes']:.0f} min, {peak} peak", "modelled")
    console.print(table)
    console.print(f"\n{kernel['reason']}")
