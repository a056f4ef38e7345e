"""Predicted checkpoint sizes against published ones (the facts are not part of the project).

Set ADVISOR_FACTS to the folder that holds sizes.csv. Rows of schemes that Advisor does not make
(IQ types, AQLM, ONNX, NNCF) and rows whose source states another thing than a file's size are left
out by rule, not by result: a source whose own 16-bit row is not two bytes per parameter counts
something else (EfficientQAT's), and GGML v3 is another file format than GGUF.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.modelspec import ModelSpec, build_modelspec
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import Scheme, parse_scheme

pytestmark = pytest.mark.bench

_LLAMA_1 = {
    "LLaMA-7B": (4096, 32, 32, 11008),
    "LLaMA-13B": (5120, 40, 40, 13824),
    "LLaMA-65B": (8192, 80, 64, 22016),
}
_UNITS = {"GiB": 2**30, "GB": 10**9, "G (ls": 2**30, "Gb": 10**9}


def _spec(model: str) -> ModelSpec | None:
    if model in _LLAMA_1:
        hidden, layers, heads, inner = _LLAMA_1[model]
        config = {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
            "vocab_size": 32000,
        }
        return build_modelspec(config, model_id=model)
    names = {
        "Llama-2-7B": "Llama-2-7b-hf",
        "Llama-2-7B-chat": "Llama-2-7b-hf",
        "Llama-2-13B-chat": "Llama-2-13b-hf",
        "Llama-2-70B": "Llama-2-70b-hf",
        "Llama-3-8B-Instruct": "Llama-3-8B",
        "Llama-3-70B-Instruct": "Llama-3-70B",
    }
    try:
        return load_modelspec(names.get(model, model))
    except InputError:  # not in the catalogue
        return None


def _scheme(method: str, bits: str, group: str) -> tuple[str, str] | None:
    if method.startswith("GGUF:"):
        kind = method.removeprefix("GGUF:").lower()
        return ("bf16", "gguf") if kind == "f16" else (f"gguf-{kind}", "gguf")
    grain = {"-1": "gch", "": "gch"}.get(group, f"g{group}")
    return {
        "GPTQ": (f"gptq-int{bits}-{grain}-sym", "gptq"),
        "EfficientQAT(GPTQ-like)": (f"gptq-int{bits}-{grain}-sym", "gptq"),
        "AWQ": (f"awq-int{bits}-{grain}-asym", "awq"),
        "FP16": ("bf16", "safetensors"),
        "BF16": ("bf16", "safetensors"),
        "INT8wo": ("rtn-int8-gch-sym", "compressed-tensors"),
        # torchao stores a 16-bit scale and a 16-bit zero per group, as HQQ does.
        "INT4wo": (f"rtn-int4-{grain}-asym", "hqq"),
        "HQQ-int4": (f"hqq-int4-{grain}-asym", "hqq"),
    }.get(method)


def _is_old(source: str) -> bool:
    return any(mark in source for mark in ("2023", "PR #1684", "examples/quantize README"))


def _is_left_out(row: dict[str, str]) -> bool:
    return "EfficientQAT README" in row["source"] or "GGML v3" in row["note"]


def _published(row: dict[str, str], spec: ModelSpec) -> tuple[float, float] | None:
    """Return bytes, and half of the last digit printed, in bytes."""
    text, unit = row["bytes_or_gb"], row["unit"]
    digits = len(text.partition(".")[2])
    if unit.startswith("G (ls"):
        # ls -h rounds up, to a tenth below ten and to a whole above: the middle of the interval.
        step = 0.1 if float(text) < 10 else 1.0
        return (float(text) - step / 2) * 2**30, step / 2 * 2**30
    if unit.startswith("bits per weight"):
        factor = spec.parameters / 8
    else:
        factor = next((size for name, size in _UNITS.items() if unit.startswith(name)), 0)
    return (float(text) * factor, 0.5 * 10**-digits * factor) if factor else None


def size_rows(folder: Path) -> list[tuple[dict[str, str], ModelSpec, float, float, float]]:
    """Return every published size that can be predicted.

    Returns:
        Per row: the row, its model, the prediction, the published bytes, and half of the last
        digit printed, in bytes.
    """
    found = []
    with (folder / "sizes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        names = _scheme(row["method"], row["bits"], row["group_size"])
        spec = _spec(row["model"]) if names and not _is_left_out(row) else None
        if names is None or spec is None:
            continue
        try:
            scheme: Scheme = parse_scheme(names[0])
            whole = "embedding table NOT counted" in row["note"] and scheme.is_quantized
            size = checkpoint_size(
                spec,
                scheme,
                names[1],
                head=scheme if whole else None,  # torchao quantizes the head too
                gguf_before_2024=_is_old(row["source"]),
            )
        except InputError:  # a type that Advisor does not make
            continue
        published = _published(row, spec)
        if published is None:
            continue
        total = size.total_bytes
        if "embedding table NOT counted" in row["note"]:
            total -= size.embedding_bytes
        found.append((row, spec, float(total), *published))
    return found


def test_published_sizes_are_predicted_within_half_a_percent():
    folder = os.environ.get("ADVISOR_FACTS")
    if not folder:
        pytest.skip("set ADVISOR_FACTS to the folder with sizes.csv")
    errors, lines = [], []
    for row, _, total, value, rounding in size_rows(Path(folder)):
        # What rounding alone explains is no error of the prediction.
        raw = total / value - 1
        error = math.copysign(max(0.0, abs(total - value) - rounding) / value, raw)
        errors.append((abs(error), abs(raw)))
        label = " ".join(row[key] for key in ("model", "method", "bits", "group_size"))
        lines.append((abs(error), f"{100 * error:+.2f}% ({100 * raw:+.2f}%) {label}"))
    for _, line in sorted(lines, reverse=True)[:25]:
        print(line)
    net, raw = (sorted(pair[i] for pair in errors) for i in (0, 1))
    print(
        f"{len(net)} rows: median {100 * statistics.median(net):.3f}% (raw "
        f"{100 * statistics.median(raw):.3f}%), 90% {100 * net[int(0.9 * len(net))]:.2f}%, "
        f"max {100 * net[-1]:.2f}%"
    )
    assert statistics.median(raw) < 0.0025
