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


_GATES = {
    "dp4a": "DP4A",
    "fp16_tensor_cores": "FP16 tensor cores",
    "bf16": "BF16 tensor cores",
    "int8_tensor_cores": "INT8 tensor cores",
    "int4_tensor_cores": "INT4 tensor cores",
    "fp8": "FP8",
    "fp4": "FP4",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "neon": "NEON",
    "neon_dotprod": "NEON dot product",
    "neon_i8mm": "NEON I8MM",
}


def _fact(console: Any, label: str, value: str) -> None:
    """Print one line of facts; what is too long goes on under the values."""
    from rich.padding import Padding
    from rich.table import Table

    row = Table.grid(padding=(0, 1))
    row.add_column(width=20, no_wrap=True)
    row.add_column()
    row.add_row(label, value)
    console.print(Padding(row, (0, 0, 0, 2)))


def _render(console: Any, document: dict[str, Any]) -> None:
    for problem in document["problems"]:
        console.print(f"[yellow]{problem}[/]")
    for device in document["devices"]:
        console.print(f"\n[bold]{device['name']}[/]")
        for label, value in device["facts"]:
            _fact(console, label, value)
        for label, answer in (("native", True), ("not native", False), ("not sure", None)):
            names = [name for name, native in device["capabilities"].items() if native is answer]
            if names:
                words = ", ".join(_GATES.get(name, name.replace("_", " ")) for name in names)
                _fact(console, label, words)
    if measured := document.get("measured"):
        threads = f", {measured['threads']} threads" if measured["threads"] else ""
        console.print(f"\n[bold]Measured[/] on {measured['name']}{threads}")
        table = output.table("", "median", "range", "in tables", "unit", "of", right=(1, 2, 3))
        for row in measured["measured"]:
            table.add_row(*_measured_cells(row))
        console.print(table)


_QUANTITIES = {
    "bandwidth_gb_s": ("memory", "GB/s"),
    "fp32_tflops": ("FP32 products", "TFLOP/s"),
    "bf16_tflops": ("BF16 products", "TFLOP/s"),
    "int8_tops": ("INT8 products", "TOP/s"),
}


def _measured_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return the cells of one quantity; where nothing was measured, why."""
    name, unit = _QUANTITIES.get(row["quantity"], (row["quantity"], ""))
    known = "unknown" if row["table"] is None else f"{row['table']:.4g}"
    if row["value"] is None:
        return name, "-", "", known, unit, row["reason"] or ""
    return (
        name, f"{row['value']:.3g}", f"{row['low']:.3g}-{row['high']:.3g}", known, unit,
        row["detail"],
    )  # fmt: skip
