"""The advice against published figures, beside other advisors, as one Markdown table.

Run as ``python tests/bench/advice_table.py --facts FOLDER [--llmfit PATH]``; needs numpy. FOLDER
holds sizes.csv (published file sizes); losses and speeds are those of profiles/evidence. PATH is
llmfit's command, installed in an environment of its own. The formula of whichllm is written anew
from its published constants; it is given the exact size of GGUF files, as its index has them.

Other advisors know one sequence on one GPU: speeds are compared on those points alone. "Held out"
means that nothing of the model (or the GPU) scored was seen: losses are fitted without its family,
speeds without that model or GPU, from coefficients that know nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fit_loss
import fit_speed
import speed_facts
import test_size_facts
from whichllm_formula import whichllm_speed

from advisor.plan.data import data_folders
from advisor.predict.speed_data import load_coefficients

NEUTRAL = {
    "step_us": 1000.0, "efficiency": 0.5, "layer_us": 300.0, "ramp_8bit": 300.0,
    "cache_factor": 5.0,
}  # fmt: skip
"""Where the search of held-out coefficients starts: nothing of them was fitted."""
QUANTS = {
    "BF16": "F16", "bf16": "F16", "fp16": "F16", "GPTQ-Int4": "GPTQ-Int4",
    "GPTQ-Int8": "GPTQ-Int8", "AWQ": "AWQ-4bit", "GPTQ int4 g128 exllama": "GPTQ-Int4",
}  # fmt: skip
Pairs = list[tuple[float, float]]


def factor(pairs: Pairs) -> float:
    """Return the median factor between prediction and measurement."""
    return math.exp(statistics.median(abs(math.log(p / m)) for p, m in pairs))


def mape(pairs: Pairs) -> float:
    """Return the mean absolute error over the measured value."""
    return sum(abs(p / m - 1) for p, m in pairs) / len(pairs)


def speed_held_out(engine: str, group: str, rounds: int) -> list[speed_facts.Point]:
    """Predict every model's (or GPU's) points with coefficients fitted to the others."""
    table = load_coefficients(data_folders("evidence"))
    shipped = table[engine]
    start = shipped
    for field in fit_speed.SEARCHED[engine]:
        start = fit_speed._with(start, field, NEUTRAL[field.rpartition(".")[2]])
    out: list[speed_facts.Point] = []
    every = [point for point in speed_facts.load_points((engine,)) if point.trusted]

    def again(coefficients: object, chosen: list[speed_facts.Point]) -> list[speed_facts.Point]:
        table[engine] = coefficients  # type: ignore[assignment]
        return [
            replace(point, predicted=speed_facts.answer(point.question) or math.nan)
            for point in chosen
        ]

    for held in sorted({getattr(point, group) for point in every}):
        train = [point for point in every if getattr(point, group) != held]
        rng, best, lowest = random.Random(0), start, math.inf
        for trial_number in range(rounds):
            field = rng.choice(fit_speed.SEARCHED[engine])
            value = fit_speed._get(best, field) * math.exp(rng.gauss(0, 0.35))
            if trial_number and "efficiency" in field and value > 0.95:
                continue
            trial = fit_speed._with(best, field, value) if trial_number else best
            error = fit_speed._error(again(trial, train))
            if error < lowest:
                best, lowest = trial, error
        out += again(best, [point for point in every if getattr(point, group) == held])
    table[engine] = shipped
    return out


class Llmfit:
    """llmfit's own command, asked for one model on one GPU at a time."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.folder = Path(tempfile.mkdtemp())
        self.kept: dict[tuple[object, ...], dict[str, object] | None] = {}

    def plan(self, model: str, quant: str, context: int, gpu: object = None) -> dict | None:
        """Return its document, or None where it does not know the model."""
        key = (model, quant, context, getattr(gpu, "id", None))
        if key not in self.kept:
            self.kept[key] = self._ask(model, quant, context, gpu)
        return self.kept[key]

    def _ask(self, model: str, quant: str, context: int, gpu: object) -> dict | None:
        arguments = [self.command]
        if gpu is not None:
            hardware = {
                "total_ram_gb": 512, "unified_memory": False,
                "gpu_memory_bandwidth_gbps": gpu.bandwidth_gb_s,
                "gpu_compute_tflops_fp16": gpu.fp16_tflops or gpu.bf16_tflops or 1.0,
            }  # fmt: skip
            path = self.folder / f"{gpu.id}.json"
            match = {"gpu_name_contains": gpu.name}
            document = {"schema_version": 1, "name": gpu.id, "match": match, "hardware": hardware}
            path.write_text(json.dumps(document))
            arguments += ["--profile", str(path)]
        arguments += ["plan", model, "--context", str(context), "--quant", quant, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None


def single_points(engine: str) -> list[tuple[speed_facts.Point, object, object]]:
    """Return the points of one sequence on one GPU, with their model and GPU."""
    found = []
    for point in speed_facts.load_points((engine,)):
        hardware = speed_facts._hardware(point.gpu)
        if point.trusted and point.batch == 1 and hardware and hardware.count == 1:
            found.append((point, speed_facts._spec(point.model), hardware))
    return found


def quant_of(method: str) -> str | None:
    """Return the name of a method that the others use."""
    if method.startswith("GGUF "):
        return {"F16": "F16", "BF16": "F16"}.get(method[5:], method[5:])
    return QUANTS.get(method)


ENGINES = ("vllm", "transformers", "llama.cpp")


def speed_rows(llmfit: Llmfit | None) -> Iterator[Sequence[str]]:
    """Score the decode speeds of each engine, beside the others."""
    for engine in ENGINES:
        every = [p for p in speed_facts.load_points((engine,)) if p.trusted]
        pairs = [(p.predicted, p.measured) for p in every]
        yield _speed_row(f"speed, {engine}, all points", "Advisor", pairs)
        shared: dict[str, Pairs] = {"Advisor": [], "llmfit": [], "whichllm's formula": []}
        for point, spec, gpu in single_points(engine):
            quant = quant_of(point.method)
            if quant is None:
                continue
            if llmfit is not None:
                plan = llmfit.plan(spec.id, quant, 2048, gpu)
                paths = {} if plan is None else {p["path"]: p for p in plan["run_paths"]}
                theirs = paths.get("gpu", {}).get("estimated_tps")
                if not theirs:
                    continue
                shared["llmfit"].append((theirs, point.measured))
            shared["Advisor"].append((point.predicted, point.measured))
            formula = whichllm_speed(spec, quant, gpu)
            shared["whichllm's formula"].append((formula, point.measured))
        for who, found in shared.items():
            if found:
                yield _speed_row(f"speed, {engine}, batch 1 on one GPU", who, found)


def held_out_rows(rounds: int) -> Iterator[Sequence[str]]:
    """Score the decode speeds of models and GPUs that the fit has not seen."""
    for engine in ENGINES:
        for group in ("model", "gpu"):
            held = [(p.predicted, p.measured) for p in speed_held_out(engine, group, rounds)]
            yield _speed_row(f"speed, {engine}, {group} held out", "Advisor", held)


def _speed_row(what: str, who: str, pairs: Pairs) -> Sequence[str]:
    ratios = sorted(p / m for p, m in pairs)
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return (what, who, str(len(pairs)), f"MAPE {mape(pairs):.0%}",
            f"median factor {factor(pairs):.2f}, range {spread}")  # fmt: skip


def size_table(folder: Path, llmfit: Llmfit | None) -> list[Sequence[str]]:
    """Score the sizes of files; the others on the rows that they know."""
    rows = test_size_facts.size_rows(folder)
    ours = [abs(total / value - 1) for _, _, total, value, _ in rows]
    net = [max(0.0, abs(total - value) - half) / value for _, _, total, value, half in rows]
    out = [_size_row("size", "Advisor", ours), _size_row("size, less rounding", "Advisor", net)]
    if llmfit is None:
        return out
    both: tuple[list[float], list[float]] = ([], [])
    for row, spec, total, value, _ in rows:
        method = row["method"]
        quant = {"AWQ": "AWQ-4bit", "GPTQ": f"GPTQ-Int{row['bits']}", "FP16": "F16", "BF16": "F16"}
        name = method.removeprefix("GGUF:") if method.startswith("GGUF:") else quant.get(method)
        plan = llmfit.plan(spec.id, name, 2048) if name else None
        if plan is not None and plan["quantization"] == name:
            both[0].append(abs(total / value - 1))
            both[1].append(abs(1e9 * plan["disk_size_gb"] / value - 1))
    out.append(_size_row("size, rows llmfit knows", "Advisor", both[0]))
    out.append(_size_row("size, rows llmfit knows", "llmfit", both[1]))
    return out


def _size_row(what: str, who: str, errors: list[float]) -> Sequence[str]:
    return (what, who, str(len(errors)), f"median {statistics.median(errors):.2%}",
            f"max {max(errors):.1%}")  # fmt: skip


def loss_table() -> list[Sequence[str]]:
    """Score the losses, fitted with every family and without the one scored."""
    cells = fit_loss.load_cells()
    values, effects = fit_loss.fit(cells)
    inside = [(c, fit_loss.evaluate(c, values, effects[c.family])) for c in cells]
    rows = []
    for what, found in (
        ("loss, in sample", inside),
        ("loss, family held out", fit_loss.cross_validate(cells)),
    ):
        s = fit_loss.summary(found)
        rows.append((
            what, "Advisor", str(s["cells"]),
            f"median factor {s['median_factor']:.2f}, {s['within_2x']:.0%} within 2x",
            f"{s['pairs_right_not_collapsed']:.1%} of pairs ordered, collapse: "
            f"{s['collapse_recall']:.0%} found, {s['collapse_precision']:.0%} right",
        ))  # fmt: skip
    return rows


def sign_row() -> Sequence[str]:
    """Score who is faster, 16 bits or quantized, where a table prints both."""
    points = [p for p in speed_facts.load_points() if p.trusted]

    def key(point: speed_facts.Point) -> tuple[object, ...]:
        return (point.engine, point.model, point.gpu, point.batch)

    sixteen = {key(p): p for p in points if p.method in ("BF16", "bf16", "fp16", "GGUF F16")}
    right = total = 0
    for point in points:
        base = sixteen.get(key(point))
        if base is None or base is point or abs(point.measured / base.measured - 1) < 0.1:
            continue
        total += 1
        right += (point.measured > base.measured) == (point.predicted > base.predicted)
    return ("sign of the speed-up", "Advisor", str(total), f"{right / total:.0%} right", "")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--llmfit", default=None)
    parser.add_argument("--rounds", type=int, default=150)
    options = parser.parse_args()
    llmfit = Llmfit(options.llmfit) if options.llmfit else None
    print("| what | who | figures | error | more |\n| --- | --- | ---: | --- | --- |")
    for rows in (
        lambda: size_table(options.facts, llmfit), loss_table, lambda: [sign_row()],
        lambda: speed_rows(llmfit), lambda: held_out_rows(options.rounds),
    ):  # fmt: skip
        for row in rows():
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
