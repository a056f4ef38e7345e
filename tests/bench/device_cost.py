"""What every stage of a search takes on a device, for blocks of a real model's shape.

    python tests/bench/device_cost.py [--device cuda] [--model llama-3.1-8b] [--blocks 2]
        [--sequences 128] [--length 256] [--vocabulary 32768] [--work FOLDER]
        [--finalists gptq-int4-g128-sym gptq-int4-g32-asym] [--no-sequential]

A Llama with the model's widths, fewer blocks and random weights is searched stage by stage, wall
time each. Costs of a stage are proportional to blocks but for embedding and head, so that seconds a
block times the model's blocks is what the whole takes; ``projection.py`` has the arithmetic beside.
A line of JSON is printed after each stage, so that a run that is stopped has told what it knows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS_STD = 0.02


def main() -> None:
    """Measure every stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--work", type=Path)
    finalists = ["gptq-int4-g128-sym", "gptq-int4-g32-asym"]
    parser.add_argument("--finalists", nargs="+", default=finalists)
    parser.add_argument("--no-sequential", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.work) as name:
        _stages(given, Path(name))


def _stages(given: argparse.Namespace, folder: Path) -> None:
    import torch

    from advisor.calibration.collect import collect_statistics, open_store
    from advisor.calibration.tokens import TokenSequences, hash_tokens
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.models.device import choose_device, computing
    from advisor.models.load import load_model
    from advisor.schemes import parse_scheme
    from advisor.search.codes import CodePool
    from advisor.search.effort import FULL
    from advisor.search.realise import realise
    from advisor.search.scores import ScoreBook

    chosen = choose_device(given.device)
    on_gpu = chosen.device.type == "cuda"

    def stage(name: str, work: Callable[[], Any]) -> Any:
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        with computing(chosen.device):
            result = work()
        if on_gpu:
            torch.cuda.synchronize()
        row = {"stage": name, "seconds": round(time.monotonic() - started, 2)}
        if on_gpu:
            row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(json.dumps(row), flush=True)
        return result

    print(json.dumps({"device": chosen.name, "torch": torch.__version__} | {
        name: value for name, value in vars(given).items() if name != "work"
    }), flush=True)  # fmt: skip
    path = stage("(model written)", lambda: _model(folder / "model", given, chosen.device))
    loaded = load_model(path, device=chosen.device)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 320, (given.sequences, given.length), generator=draws)
    calibration = TokenSequences(ids, "random", "", 0, hash_tokens(ids))
    few = torch.randint(2, 320, (32, 256), generator=draws)
    judged = TokenSequences(few, "random", "", 0, hash_tokens(few))
    store = open_store(loaded, calibration, root=folder)
    stage("statistics", lambda: collect_statistics(loaded, calibration, store))
    settings = FULL.settings
    book = ScoreBook(loaded, store, folder / "scores")
    options = [parse_scheme(f"gptq-int{bits}-{group}-sym")
               for bits in (4, 8) for group in ("g32", "g64", "g128", "gch")]  # fmt: skip
    stage(f"scoring {len(options)} options", lambda: book.scores(options, settings, None))
    reference = stage("reference", lambda: Reference.compute(loaded, judged, folder))
    for scheme in map(parse_scheme, given.finalists):
        uniform = {linear.name: scheme for linear in loaded.linears}

        def make(own: Any = uniform, *, sequential: bool = False) -> Any:
            return realise(
                loaded, own, replace(settings, sequential=sequential), store,
                calibration=calibration if sequential else None, pool=CodePool(folder),
            )  # fmt: skip

        made = stage(f"finalist {scheme}", make)
    with quantized_model(loaded.model, made.weights, made.replaced):
        stage("evaluation of the last", lambda: measure(loaded.model, reference))
    if not given.no_sequential:
        stage("the last, sequential", lambda: make(sequential=True))


def _model(folder: Path, given: argparse.Namespace, device: Any) -> Path:
    """Write a random Llama in bfloat16 of a model's widths, with the tests' tokenizer."""
    import sys

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from advisor.predict.models import load_modelspec

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from conftest import build_llama

    widths = load_modelspec(given.model).text_config
    sizes = {
        name: widths[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads",
                                        "num_key_value_heads")
    } | {
        "vocab_size": given.vocabulary, "num_hidden_layers": given.blocks,
        "max_position_embeddings": max(given.length, 4096), "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**sizes))
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=WEIGHTS_STD)
    model.to("cpu").save_pretrained(folder)
    small = build_llama(folder.with_name("small"))
    AutoTokenizer.from_pretrained(small).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
