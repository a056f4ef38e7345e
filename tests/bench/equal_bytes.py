"""Other libraries' checkpoints beside what a search finds in as many bytes: one table.

    python tests/bench/equal_bytes.py MODEL_FOLDER CHECKPOINT [CHECKPOINT ...] [--gpu rtx-4090]
        [--engine vllm] [--trials 40] [--work FOLDER] [--length 256] [--sequences 32]

Checkpoints are folders that libraries wrote, for example by ``advisor backends run``; each is read
by Advisor's own readers and judged on the same held-out sequences as the answer of ``advisor
tune``, which gets exactly the bytes of its files as its budget. The answer is applied, and its
files are counted too.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import advisor
from advisor.budgets import Budgets
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.formats.read import read_checkpoint
from advisor.models.load import LoadedModel, load_model
from advisor.plan.folders import cache_root
from advisor.workflows.checkpoints import contents
from advisor.workflows.texts import draw

if TYPE_CHECKING:
    from advisor.plan.schema import Interval


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("equal-bytes"))
    given = parser.parse_args()
    loaded = load_model(given.model)
    evaluation = draw(
        (), loaded.tokenizer, role="evaluation", sequences=given.sequences,
        sequence_length=given.length, seed=0,
    )  # fmt: skip
    reference = Reference.compute(loaded, evaluation, cache_root())
    print("| checkpoint | bytes | KL | perplexity | top-1 | ours | bytes | KL | ratio | search |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for folder in given.checkpoints:
        _row(folder, given, loaded, reference)


def _row(
    folder: Path, given: argparse.Namespace, loaded: LoadedModel, reference: Reference
) -> None:
    size = weight_bytes(folder)
    weights, replaced = contents(read_checkpoint(folder), loaded)
    with quantized_model(loaded.model, weights, replaced) as model:
        theirs = measure(model, reference)
    plan, output = given.work / f"{folder.name}.yaml", given.work / folder.name
    start = time.perf_counter()
    tuning = advisor.tune(
        given.model, gpu=given.gpu, engine=given.engine, context=2048, output=plan,
        budgets=Budgets(max_size_bytes=size), trials=given.trials,
        evaluation_sequences=given.sequences, samples=given.sequences,
        sequence_length=given.length, calibration=["builtin:calibration"],
    )  # fmt: skip
    seconds = time.perf_counter() - start
    advisor.apply(plan, output)
    expected = tuning.result.plan.expected
    ours = expected.kl
    if ours is None:
        raise SystemExit(f"the search for {size} bytes measured nothing")
    cells = [
        folder.name, f"{size / 1e6:.1f} MB", _interval(theirs.kl), f"{theirs.perplexity:.2f}",
        f"{theirs.top1.value:.1%}", tuning.result.plan.scheme.name,
        f"{weight_bytes(output) / 1e6:.1f} MB", _interval(ours),
        f"{ours.value / theirs.kl.value:.2f}", f"{seconds:.0f} s",
    ]  # fmt: skip
    print("|", " | ".join(cells), "|", flush=True)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weight files."""
    files = [path for kind in ("safetensors", "gguf") for path in folder.glob(f"*.{kind}")]
    return sum(path.stat().st_size for path in files)


def _interval(value: Interval) -> str:
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"


if __name__ == "__main__":
    main()
