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
    quantize_head: opt.QuantizeHead = False,
    quantize_embedding: opt.QuantizeEmbedding = False,
    profiles: opt.Profiles = [],  # noqa: B006 - Typer copies defaults
    json: opt.Json = False,
    verbose: opt.Verbose = False,
    debug: opt.Debug = False,
) -> None:
    """Predict one scheme: size exactly, memory, speed and loss as intervals, and its kernel."""
    from advisor import workflows

    result = workflows.predict(
        model, scheme, gpu=gpu, engine=engine, context=context, batch=batch,
        quantize_head=quantize_head, quantize_embedding=quantize_embedding,
    )  # fmt: skip
    output.show(result.to_dict(), _render)


def _render(console: Any, document: dict[str, Any]) -> None:
    candidate = document["candidate"]
    kernel, memory, cost = (
        candidate["kernel"], candidate["memory_bytes"] or {}, candidate["quantization_cost"] or {}
    )  # fmt: skip
    console.print(
        f"[bold]{candidate['name']}[/] of [bold]{document['model']['id']}[/] on "
        f"[bold]{output.device(document['hardware'])}[/], served by [bold]{document['engine']}[/]"
    )
    output.print_notes(console, candidate)
    if not candidate["feasible"] and candidate["why_not"]:
        source = f" [{kernel['source']}]"
        why = candidate["why_not"].removesuffix(source)
        verdict = "Does not run." if kernel["support"] == "none" else "Does not fit."
        console.print(f"[bold red]{verdict}[/] ", end="")
        console.print(f"{why}\n", markup=False)
    table = output.table("", "", "known by")
    bits = f"{candidate['bits_per_weight']:.2f} bits per weight"
    table.add_row("size", f"{output.size(candidate['size_bytes'])}, {bits}", "calculation")
    parts = ", ".join(
        f"{key.replace('_', ' ')} {output.size(memory.get(key))}"
        for key in ("weights", "kv_cache", "activations", "overhead")
    )
    table.add_row("memory", f"{output.size(memory.get('total'))}: {parts}", "calculation")
    for name, scheme in candidate["outer"].items():
        table.add_row(name, f"{scheme}; what that costs in quality is not in the loss", "choice")
    loss = candidate["loss"] or {}
    expected = output.interval(loss, middle="expected")
    table.add_row("loss, 90% range", expected, loss.get("basis") or "")
    if (loss.get("collapse_risk") or 0) >= 0.01:
        risk = output.percent(loss["collapse_risk"])
        table.add_row("risk of collapse", risk, loss.get("basis") or "")
    table.add_row("decode tok/s", output.speed(candidate["decode_tokens_per_s"]), "model")
    table.add_row("prefill tok/s", output.speed(candidate["prefill_tokens_per_s"]), "model")
    gain = candidate["speedup_over_16bit"]
    table.add_row("speedup", "unknown" if gain is None else f"{gain:.2f}x over 16-bit", "model")
    name = f": {kernel['name']}" if kernel["name"] else ""
    table.add_row("kernel", f"{kernel['support']}{name}", "rule")
    if cost.get("minutes") is not None:
        peak = output.size(cost.get("peak_memory_bytes"))
        table.add_row("quantizing", f"{output.minutes(cost['minutes'])}, {peak} peak", "model")
    console.print(table)
    if kernel["support"] != "none":  # else it is the reason why it does not run, said above
        console.print(f"\n[bold]Kernel.[/] {kernel['reason']}.")
    if kernel["source"]:
        console.print(f"  [dim]{kernel['source']}[/]", soft_wrap=True)
    if loss.get("sources"):
        console.print("[bold]Evidence of loss.[/]")
        for source in loss["sources"][:3]:
            console.print(f"  [dim]{source}[/]", soft_wrap=True)
