"""How the cost of every stage grows with blocks, width, tokens and options: a table with exponents.

    python tests/bench/growth.py [--work FOLDER] [--table]

Random Llamas (three times as wide in the middle, a vocabulary of 320); every configuration is a
process of its own, which measures CPU seconds in one thread and what is resident at most, less what
importing torch and transformers takes. One thing is changed at a time. An exponent is the slope of
the logarithms over the three values: 1 is proportional, 2 is quadratic; that of the last step is
nearer to what large sizes do. Results are lines of JSON in FOLDER/rows.jsonl: a run goes on where a
stopped one was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from cpu_cost import cost, one_thread
from search_memory import reset_peak, resident

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BASE = {"blocks": 4, "hidden": 128, "tokens": 2048, "options": 4}
VALUES = {
    "blocks": (4, 8, 16), "hidden": (128, 256, 512), "tokens": (2048, 4096, 8192),
    "options": (1, 4, 16),
}  # fmt: skip
LENGTH = 128
STAGES = ("statistics", "scoring", "scoring, per option", "finalist", "sequential finalist",
          "evaluation")  # fmt: skip


def main() -> None:
    """Measure what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("growth"))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help="one configuration, as JSON")
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(_measure(**json.loads(given.one))))
        return
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    for wanted in () if given.table else _configurations():
        if any(row["configuration"] == wanted for row in rows):
            continue
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(wanted)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(done.stderr[-3000:])
        rows.append({"configuration": wanted, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(rows[-1]) + "\n")
    _print(rows)


def _configurations() -> Iterator[dict[str, int]]:
    yield BASE
    for name, values in VALUES.items():
        for value in values:
            if value != BASE[name]:
                yield BASE | {name: value}


def _measure(blocks: int, hidden: int, tokens: int, options: int) -> dict[str, Any]:
    """Return {stage: [CPU seconds, bytes resident at most above the imports]}."""
    one_thread()
    import torch
    import transformers

    assert transformers.AutoModelForCausalLM
    baseline = resident("VmRSS")
    from advisor.calibration.collect import collect_statistics, open_store
    from advisor.calibration.tokens import TokenSequences, hash_tokens
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.models.load import load_model
    from advisor.search.codes import CodePool
    from advisor.search.effort import FULL
    from advisor.search.realise import realise
    from advisor.search.scores import ScoreBook

    found: dict[str, tuple[float, int]] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        reset_peak()
        with cost() as spent:
            result = work()
        found[name] = (spent.cpu_s, resident() - baseline)
        return result

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loaded = load_model(_llama(folder / "model", blocks, hidden))
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 320, (2, tokens // LENGTH, LENGTH), generator=draws)
        calibration, judged = (
            TokenSequences(part, "random", "", 0, hash_tokens(part)) for part in ids
        )
        store = open_store(loaded, calibration, root=folder)
        stage("statistics", lambda: collect_statistics(loaded, calibration, store))
        schemes = _schemes()[:options]
        book = ScoreBook(loaded, store, folder / "scores")
        settings = FULL.settings
        stage("scoring", lambda: book.scores(schemes, settings, None))
        seconds, peak = found["scoring"]
        found["scoring, per option"] = (seconds / options, peak)
        uniform = {linear.name: schemes[0] for linear in loaded.linears}
        made = stage(
            "finalist", lambda: realise(loaded, uniform, settings, store, pool=CodePool(folder))
        )
        reference = Reference.compute(loaded, judged, folder)

        def judge() -> None:
            with quantized_model(loaded.model, made.weights, made.replaced):
                measure(loaded.model, reference)

        stage("evaluation", judge)
        following = replace(settings, sequential=True)
        stage(
            "sequential finalist",
            lambda: realise(
                loaded, uniform, following, store, calibration=calibration, pool=CodePool(folder)
            ),
        )
    return {"stages": found}


def _llama(folder: Path, blocks: int, hidden: int) -> Path:
    """Write a random Llama in bfloat16, with the tests' tokenizer."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import build_llama
    from test_memory import to_bf16

    return to_bf16(
        build_llama(
            folder, num_hidden_layers=blocks, hidden_size=hidden, intermediate_size=3 * hidden,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64,
        )
    )  # fmt: skip


def _schemes() -> list[Any]:
    """Return sixteen options of GPTQ."""
    from advisor.schemes import parse_scheme

    names = [
        f"gptq-int{bits}-g{group}-sym" for bits in (4, 8, 3, 5, 6, 2) for group in (32, 64, 128)
    ]
    return [parse_scheme(name) for name in names[:16]]


def _print(rows: list[dict[str, Any]]) -> None:
    base = next(row["stages"] for row in rows if row["configuration"] == BASE)
    print("| stage | CPU s | MB | " + " | ".join(VALUES) + " |")
    print("|---|---|---|" + "---|" * len(VALUES))
    for stage in STAGES:
        seconds, peak = base[stage]
        cells = [_growth(rows, stage, name) for name in VALUES]
        print(f"| {stage} | {seconds:.2f} | {peak / 1e6:.0f} | " + " | ".join(cells) + " |")
    described = ", ".join(f"{value} {name}" for name, value in BASE.items())
    print(
        f"\nBase: {described}. Cells: exponent of CPU seconds, of its last "
        "step alone, (of memory).\n"
    )
    print("| configuration | " + " | ".join(STAGES) + " |")
    print("|---|" + "---|" * len(STAGES))
    for row in rows:
        label = ", ".join(f"{value} {name}" for name, value in row["configuration"].items())
        cells = [f"{row['stages'][s][0]:.2f} s, {row['stages'][s][1] / 1e6:.0f} MB" for s in STAGES]
        print(f"| {label} | " + " | ".join(cells) + " |")


def _growth(rows: list[dict[str, Any]], stage: str, name: str) -> str:
    """Return the exponents of a stage's time and memory in one of the sizes."""
    points = [
        (row["configuration"][name], *row["stages"][stage])
        for row in rows
        if all(row["configuration"][other] == BASE[other] for other in BASE if other != name)
    ]
    if len(points) < len(VALUES[name]):
        return ""
    table = np.log(np.maximum(np.array(sorted(points)), 1e-9))
    size, seconds, peak = table.T
    last = (seconds[-1] - seconds[-2]) / (size[-1] - size[-2])
    every, memory = (np.polyfit(size, column, 1)[0] for column in (seconds, peak))
    return f"{every:.2f}, {last:.2f} ({memory:.2f})"


if __name__ == "__main__":
    main()
