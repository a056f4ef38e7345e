"""What a search of an 8B and a 70B Llama would take on one H100: arithmetic, not measured.

    python tests/bench/projection.py [--models llama-3.1-8b llama-3.1-70b] [--gpu h100-sxm]
        [--sequences 32] [--length 2048]

Operations are counted from the shapes and divided by what the device is taken to reach: its peak
in the data type (``profiles/hardware``) times the share that large products reach in transformers
(``profiles/evidence/speed.yaml``). Advisor computes blocks, moments and codes in float32, factors
in float64. Where a loop runs column by column, the launches of its kernels are counted too.
``device_cost.py`` measures the stages on blocks of such shapes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.modelspec import LinearSpec, ModelSpec

FP64_TFLOPS = 34.0
"""H100 SXM, FP64 without tensor cores (NVIDIA's data sheet); the profiles have no FP64."""
LAUNCH_S = 5e-6
"""Assumed: launch of a small kernel from Python."""
LAUNCHES = {"codes": 12 / 16, "descent": 8 * 14 / 128}
"""Kernels of one column: a block of 16 columns takes about 12 in ``column_loop``; a visit of the
descent 14, once for each of 8 turns of rows and each group of 128 (``columns_in_turn``)."""
PCIE_BYTES_S = 25e9
"""Assumed: copying a block's weights and sums between host and device (PCIe 5 x16, half of 64)."""
DESCENT = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One stage.

    Attributes:
        stage: Its name.
        arithmetic: What was multiplied, with the numbers.
        seconds: The projection.
    """

    stage: str
    arithmetic: str
    seconds: float


def main() -> None:
    """Print a Markdown table for each model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["llama-3.1-8b", "llama-3.1-70b"])
    parser.add_argument("--gpu", default="h100-sxm")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    given = parser.parse_args()
    from advisor.predict.models import load_modelspec
    from advisor.workflows.resolve import resolve_hardware

    device = resolve_hardware(given.gpu)
    evidence = Path(__file__).parents[2] / "profiles" / "evidence"
    speed = yaml.safe_load((evidence / "speed.yaml").read_text(encoding="utf-8"))
    share = speed["engines"]["transformers"]["kernels"]["16-bit"]["utilization"]
    single = share * (device.figure("fp32_tflops") or 0) * 1e12
    double = share * FP64_TFLOPS * 1e12
    print(f"Projected, not measured: {device.name}, float32 at {single / 1e12:.0f} TFLOP/s "
          f"({share:.0%} of {device.figure('fp32_tflops'):.0f}), float64 at {double / 1e12:.0f} "
          f"({share:.0%} of {FP64_TFLOPS:.0f}), {LAUNCH_S * 1e6:.0f} us a launch, "
          f"{given.sequences} x {given.length} tokens.\n")  # fmt: skip
    for name in given.models:
        spec = load_modelspec(name)
        print(f"**{name}**: {spec.quantizable_parameters / 1e9:.2f}e9 weights in linears\n")
        print("| stage | arithmetic | projected |")
        print("|---|---|---|")
        for row in rows_of(spec, given.sequences, given.length, single, double):
            print(f"| {row.stage} | {row.arithmetic} | {_time(row.seconds)} |")
        print(f"\n{_space(spec, given.sequences, given.length)}\n")


def rows_of(
    spec: ModelSpec, sequences: int, length: int, single: float, double: float
) -> list[Row]:
    """Return the stages of a search.

    Args:
        spec: The model.
        sequences: Of the calibration.
        length: Tokens of each.
        single: FLOP/s in float32.
        double: FLOP/s in float64.
    """
    tokens = sequences * length
    parameters = spec.quantizable_parameters
    groups = _groups(spec.linears)
    squares = sum(size**2 for size, _ in groups)
    gradients = sum(_gradient_values(linear) for linear in spec.linears)
    passes = 6 * parameters * tokens
    moments = tokens * (squares + gradients)
    traffic = 3 * 2 * parameters + 4 * (squares + gradients) / 2
    cubes = sum(size**3 for size, _ in groups)
    loops = sum(rows * size**2 for size, rows in groups)
    columns = sum(size for size, _ in groups)
    factor_s = (cubes / 3 + cubes) / double
    launches_s = columns * LAUNCHES["codes"] * LAUNCH_S
    option_s = (loops + 2 * loops) / single  # its share of the loop, and ΔW H for the score
    descent_s = DESCENT * (2 * loops / single + columns * LAUNCHES["descent"] * LAUNCH_S)
    codes_s = factor_s + launches_s + loops / single + descent_s
    judged = 32 * 256
    b, e = 1e9, 1e12
    return [
        Row("statistics, forward and backward",
            f"6 x {parameters / b:.2f}e9 x {tokens} = {passes / e:,.0f}e12",
            passes / single),
        Row("their moments of inputs and gradients",
            f"{tokens} x ({squares / b:.2f}e9 + {gradients / b:.2f}e9) = {moments / e:,.0f}e12",
            moments / single),
        Row("weights and sums between host and device",
            f"{traffic / b:.0f} GB at {PCIE_BYTES_S / b:.0f} GB/s", traffic / PCIE_BYTES_S),
        Row("factors of H (float64), once for all options of a call",
            f"(1/3 + 1) x sum n^3 = {4 / 3 * cubes / e:,.0f}e12", factor_s),
        Row("column loop, once for all options of a call",
            f"{columns} columns x {LAUNCHES['codes']:.2f} launches", launches_s),
        Row("an option in it, scored",
            f"3 x sum rows x n^2 = {3 * loops / e:,.0f}e12", option_s),
        Row("scoring 12 options in two calls", "2 x (factors + launches) + 12 options",
            2 * (factor_s + launches_s) + 12 * option_s),
        Row("a finalist: factors, codes and three passes of descent",
            f"descent: 3 x (2 x {loops / e:,.0f}e12, {columns} x {LAUNCHES['descent']:.2f} "
            "launches)",
            codes_s),
        Row("its evaluation on 32 x 256 tokens",
            f"2 x {parameters / b:.2f}e9 x {judged} = {2 * parameters * judged / e:,.0f}e12",
            2 * parameters * judged / single),
        Row("a sequential finalist: three forward passes, two moments, solves, codes",
            f"6 x {parameters / b:.2f}e9 x {tokens} + 3 x {tokens} x {squares / b:.2f}e9",
            (passes + 3 * tokens * squares) / single + 2 * factor_s + codes_s),
    ]  # fmt: skip


def _groups(linears: Sequence[LinearSpec]) -> list[tuple[int, int]]:
    """Return (inputs, rows of all linears that read them) of every input group."""
    sizes: dict[str, tuple[int, int]] = {}
    for linear in linears:
        _, rows = sizes.get(linear.input_group, (0, 0))
        sizes[linear.input_group] = (linear.in_features, rows + linear.out_features)
    return list(sizes.values())


def _gradient_values(linear: LinearSpec) -> int:
    """Return the values of a linear's gradient moment: a matrix, or its diagonal where large."""
    from advisor.calibration.settings import keeps_full_gradient

    full = keeps_full_gradient(linear, "full")
    return linear.out_features ** (2 if full else 1)


def _space(spec: ModelSpec, sequences: int, length: int) -> str:
    """Return a sentence on disk and memory."""
    from advisor.calibration.settings import (
        CollectionSettings,
        default_prefixes,
        kept_bytes,
        needed_bytes,
    )

    settings, compact = (
        CollectionSettings(
            default_prefixes(sequences, compact=short), "full", 0, "float32", compact=short
        )
        for short in (False, True)
    )
    tokens = sequences * length
    block = [linear for linear in spec.linears if linear.block == spec.linears[0].block]
    weights = 4 * sum(linear.parameters for linear in block)
    inputs = {linear.input_group: linear.in_features for linear in block}
    sums = 2 * sum(size**2 for size in inputs.values()) + sum(map(_gradient_values, block)) * 2
    largest = max(size for size in inputs.values())
    factor = 8 * 3 * largest**2
    hidden = next(linear.in_features for linear in block)
    peak, short_peak = (needed_bytes(spec.linears, s, tokens, hidden) for s in (settings, compact))
    kept, short = (kept_bytes(spec.linears, s, tokens) for s in (settings, compact))
    return (
        f"Disk: {peak / 1e9:.0f} GB while collecting, {kept / 1e9:.0f} GB of statistics kept "
        f"(Advisor's own prediction, prefixes {', '.join(map(str, settings.prefixes))}); where "
        f"there is no room for that, {short_peak / 1e9:.0f} and {short / 1e9:.0f} GB. Memory: a "
        f"block in float32 {weights / 1e9:.1f} GB, its sums {sums / 1e9:.1f} GB, factoring the "
        f"largest H in float64 {factor / 1e9:.1f} GB; 16-bit weights "
        f"{2 * spec.quantizable_parameters / 1e9:.0f} GB stay in their files."
    )


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
