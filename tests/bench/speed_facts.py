"""Published speeds beside the prediction: which points can be predicted, and how far off it is."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from advisor.engines import verdict
from advisor.errors import AdvisorError
from advisor.hardware.catalogue import find_profile
from advisor.hardware.profile import HardwareProfile
from advisor.modelspec import ModelSpec
from advisor.predict.models import find_model_file, load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.predict.speed import predict_speed
from advisor.schemes import Scheme, parse_scheme

EVIDENCE = Path(__file__).resolve().parents[2] / "profiles" / "evidence"
SCHEMES = {
    "BF16": "bf16", "bf16": "bf16", "fp16": "bf16", "FP8": "rtn-fp8-b128-afp8",
    "GPTQ-Int8": "gptq-int8-g128-sym", "GPTQ-Int4": "gptq-int4-g128-sym",
    "GPTQ-INT4": "gptq-int4-g128-sym", "AWQ": "awq-int4-g128-asym",
    "AWQ-INT4": "awq-int4-g128-asym", "bnb NF4": "bnb-nf4", "bnb NF4 double-quant": "bnb-nf4-dq",
    "bnb LLM.int8 outlier decomposition": "llm.int8", "bnb 4bit": "bnb-nf4",
    "int8 rowwise weight-only W8A16": "rtn-int8-gch-sym",
    "float8 rowwise W8A8": "rtn-fp8-gch-afp8", "nvfp4 W4A4 (torchao)": "nvfp4-anvfp4",
    "GPTQ int4 g128 exllama": "gptq-int4-g128-sym", "GGUF F16": "bf16", "GGUF BF16": "bf16",
}  # fmt: skip
GPUS = {
    "A100 80GB": "a100-sxm-80", "A100-SXM4-80GB": "a100-sxm-80", "A100 SXM 80GB": "a100-sxm-80",
    "H100": "h100-sxm", "H100 80GB SXM": "h100-sxm", "H20 96GB": "h20", "3090 24GB": "rtx3090",
    "H100 PCIe 80GB": "h100-pcie", "A100 PCIe 80GB": "a100-pcie-80", "RTX 3060": "rtx3060-12",
    "3080 10GB": "rtx3080-10", "Tesla P40": "p40", "RTX A6000 48GB": "a6000", "A40 48GB": "a40",
    "RTX 6000 Ada 48GB": "rtx6000ada", "4080 16GB": "rtx4080", "4070 Ti 12GB": "rtx4070ti",
}  # fmt: skip
NAMES = {
    "llama 7b": "meta-llama/Llama-2-7b-hf", "llama 8b": "meta-llama/Llama-3.1-8B",
    "llama 3.1 8b": "meta-llama/Llama-3.1-8B", "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3-8b": "meta-llama/Llama-3.1-8B",
    "llama-2-13b-hf": "meta-llama/Llama-2-13b-hf",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One measurement and what is predicted for it."""

    engine: str
    model: str
    gpu: str
    method: str
    batch: int
    measured: float
    predicted: float
    trusted: bool
    question: dict[str, Any]
    """What :func:`answer` needs to predict it again with other coefficients."""


def load_points(engines: tuple[str, ...] | None = None) -> list[Point]:
    """Predict every decode measurement whose model, GPU and method are known."""
    points = []
    with (EVIDENCE / "speed_points.csv").open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            if "NOT decode" in row["metric"] or "proxy" in row["metric"]:
                continue
            if engines is not None and _engine(row["engine"]) not in engines:
                continue
            point = _point(row)
            if point is not None:
                points.append(point)
    return points


def _point(row: dict[str, str]) -> Point | None:
    engine = _engine(row["engine"])
    scheme = _scheme(row["method"])
    spec = _spec(row["model"])
    hardware = _hardware(row["gpu"])
    if engine is None or scheme is None or spec is None or hardware is None:
        return None
    context = _context(row)
    question = ask(spec, scheme, hardware, engine, context, int(row["batch"]))
    prediction = None if question is None else answer(question)
    if question is None or prediction is None:
        return None
    community = "llmfit" in row["source"]
    return Point(
        engine, row["model"], row["gpu"], row["method"], int(row["batch"]),
        float(row["tokens_per_s"]), prediction, not community, question,
    )  # fmt: skip


def ask(
    spec: ModelSpec,
    scheme: Scheme,
    hardware: HardwareProfile,
    engine: str,
    context: int,
    batch: int,
) -> dict[str, Any] | None:
    """Return all that a prediction needs beside coefficients; None where no kernel runs it."""
    kernel = verdict(engine, scheme, hardware, spec.linears)
    if kernel.support == "none" or kernel.format is None:
        return None
    if engine == "transformers" and scheme.weight == "fp8":
        return None
    try:
        size = checkpoint_size(spec, scheme, kernel.format)
    except AdvisorError:
        return None
    return {
        "spec": spec, "scheme": scheme, "kernel": kernel, "hardware": hardware, "engine": engine,
        "linear_bytes": size.quantizable_bytes, "context": context, "batch": batch,
    }  # fmt: skip


def answer(question: dict[str, Any]) -> float | None:
    """Predict decode tokens/s; None where the bandwidth is not known."""
    speed = predict_speed(**question)
    return None if speed.decode is None else speed.decode.expected


def _engine(name: str) -> str | None:
    for prefix, engine in (
        ("vllm", "vllm"), ("sglang", "sglang"), ("transformers", "transformers"),
        ("llama.cpp", "llama.cpp"), ("llamacpp", "llama.cpp"),
    ):  # fmt: skip
        if name.startswith(prefix):
            return engine
    return None


def _scheme(method: str) -> Scheme | None:
    if method in SCHEMES:
        return parse_scheme(SCHEMES[method])
    if method.startswith("GGUF "):
        try:
            return parse_scheme("gguf-" + method[5:].lower())
        except AdvisorError:
            return None
    return None


@lru_cache(maxsize=512)
def _spec(name: str) -> ModelSpec | None:
    plain = name.rpartition("/")[2].rpartition("_")[2] if name.endswith(".gguf") else name
    plain = re.sub(r"[-.]?(Q\d\w*|gguf|GGUF|UD)(?=[-.]|$)", "", plain).strip("-. ")
    short = re.sub(r"-(Instruct|it|Chat|hf)$", "", plain, flags=re.IGNORECASE)
    for text in (NAMES.get(plain.lower(), plain), plain, short, f"{plain}-Instruct"):
        try:
            if find_model_file(text) is not None:
                return load_modelspec(text)
        except AdvisorError:
            continue
    return None


@lru_cache(maxsize=256)
def _hardware(name: str) -> HardwareProfile | None:
    match = re.fullmatch(r"(.*?)(?: ?[x*] ?(\d+))?", name)
    plain = match[1].strip() if match else name
    try:
        profile = find_profile(GPUS.get(plain, plain))
    except AdvisorError:
        return None
    return profile.model_copy(update={"count": int(match[2] or 1)}) if match else profile


def _context(row: dict[str, str]) -> int:
    if "+" in row["context"]:
        return sum(int(part) for part in row["context"].split("+")) // 2
    context = int(row["context"] or 512)
    if "2048 generated" in row["metric"]:
        context += 1024
    if "ctx_alloc" in row["note"]:
        context = min(context, 1024)
    return context


def mape(points: list[Point]) -> float:
    """Return the mean absolute error over the measured value."""
    return sum(abs(p.predicted / p.measured - 1) for p in points) / max(1, len(points))


def median_factor(points: list[Point]) -> float:
    """Return the median of the factor between prediction and measurement."""
    errors = sorted(abs(math.log(p.predicted / p.measured)) for p in points)
    return math.exp(errors[len(errors) // 2])


__all__ = ["Point", "answer", "ask", "load_points", "mape", "median_factor"]
