"""Fit the loss model to profiles/evidence/accuracy.csv and write profiles/evidence/loss.yaml.

Run as ``python tests/bench/fit_loss.py``; needs numpy. Robust ridge regression of
log(log(perplexity ratio)), each family with an effect of its own that is shrunk towards none.
"""

from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from advisor.predict.loss_features import (
    GGUF_MIXTURE_BITS,
    correction_key,
    features_of,
    model_features,
)

EVIDENCE = Path(__file__).resolve().parents[2] / "profiles" / "evidence"
METHODS = {
    "RTN": "rtn", "GPTQ": "gptq", "AWQ": "awq", "HQQ": "hqq", "NF4": "nf4", "FP4": "fp4",
    "SmoothQuant": "smoothquant", "LLM.int8()": "llm.int8",
}  # fmt: skip
FLOOR = 0.0007
CAP = math.log(13.8)
COLLAPSED_WEIGHT = 0.6
RIDGE, FAMILY_RIDGE = 1.0, 3.0
AT_LEAST_ZERO = {
    "log_group", "log_group*low_bits", "per_channel", "symmetric", "symmetric*per_channel",
    "per_tensor", "low_bits", "very_low_bits", "activation:int8", "per_channel*rounding",
    "per_channel*rounding*low_bits", "modern", "unsmoothed",
}  # fmt: skip
"""Effects whose sign is known: a coarser grid, fewer bits never help."""
AT_MOST_ZERO = {"low_bits*gptq", "low_bits*awq", "act_order", "high_bits", "k_quants"}
PRIORS = {
    "log_group": (0.18, 30.0),
    "symmetric": (0.1, 40.0),
    "act_order": (-0.05, 30.0),
    "unsmoothed": (0.3, 5.0),
}
"""Mean and weight where the tables confound an effect with the models it was published for.
Halving a group cuts the loss of int4 rounding by about a sixth (log_group is per doubling)."""
ASSUMED = {
    "method:autoround": -0.4, "low_bits*autoround": -0.1,
    "method:fp8": 0.0, "activation:fp8": 0.25, "per_tensor": 0.3,
    "method:nvfp4": 0.1, "method:mxfp4": 0.6, "activation:4bit": 0.5, "method:llm.int8": -0.3,
}  # fmt: skip
"""Coefficients that no perplexity cell decides: AutoRound sits with GPTQ in the task tables;
torchao prints 1.2% for FP8 and 15% for NVFP4 W4A4 on Llama-3.1-8B; LLM.int8() keeps outliers."""
ASSUMED_FAMILIES = {"smollm": 1.2}
"""No table prints perplexities of SmolLM2; the 135M model measured here with int4 g64 has a KL of
0.47 by rounding and 0.46 by GPTQ, 3.3 times what the other families let expect at that size."""


@dataclass
class Cell:
    """One published perplexity beside its baseline."""

    model: str
    family: str
    billions: float
    key: str
    bits: int
    log_ratio: float
    features: dict[str, float]
    source: str
    protocol: str

    @property
    def target(self) -> float:
        return math.log(min(max(self.log_ratio, FLOOR), math.exp(CAP)))


def load_cells() -> list[Cell]:
    """Read every perplexity cell of a method that Advisor knows."""
    cells = []
    with (EVIDENCE / "accuracy.csv").open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            cell = _cell(row)
            if cell is not None:
                cells.append(cell)
    return cells


def _cell(row: dict[str, str]) -> Cell | None:
    if "ppl" not in row["metric"] or row["metric"] == "ppl_ratio" or not row["params_b"]:
        return None
    if not row["baseline_value"] or not row["quantized_value"] or row["flag"]:
        return None
    variant = row["variant"].lower()
    if any(
        word in variant
        for word in ("mixed", "fine-tuned", "fine tuned", "20% int8", "kv4", "qat", "_r80")
    ):
        return None
    ratio = float(row["quantized_value"]) / float(row["baseline_value"])
    features, key = _features(row, variant)
    if features is None:
        return None
    return Cell(
        row["model"], row["family"], float(row["params_b"]), key, int(row["bits"]),
        math.log(ratio), features, row["source"], row["protocol"] + row["metric"],
    )  # fmt: skip


def _features(row: dict[str, str], variant: str) -> tuple[dict[str, float] | None, str]:
    name, bits = row["method"], int(row["bits"])
    if name.startswith("GGUF:") and name[5:].lower() in GGUF_MIXTURE_BITS:
        kind = name[5:]
        bpw = GGUF_MIXTURE_BITS[kind.lower()]
        if "2023" in variant and kind == "Q2_K":
            bpw = 3.35
        return features_of("gguf", bpw, 32, None, 16, k_quants="_K" in kind), f"gguf:{_class(bits)}"
    if name not in METHODS or row["act_bits"] not in ("16", "8"):
        return None, ""
    method = METHODS[name]
    if method == "smoothquant" and row["act_bits"] != "8":
        return None, ""
    group = int(row["group_size"]) if row["group_size"] else 128
    symmetric = None
    if "asym" in variant or name in ("AWQ", "HQQ") or "uint4" in variant:
        symmetric = False
    elif "sym" in variant or name == "SmoothQuant":
        symmetric = True
    if method in ("nf4", "fp4"):
        symmetric = None
    order = name == "GPTQ" and "act-order" in variant and "no act-order" not in variant
    return (
        features_of(method, bits, group, symmetric, int(row["act_bits"]), act_order=order),
        f"{method}:{_class(bits)}",
    )


def _class(bits: int) -> str:
    return {1: "2", 2: "2", 3: "3", 4: "4"}.get(bits, "8")


def _row(cell: Cell) -> dict[str, float]:
    row = {**cell.features, **model_features(cell.family, cell.billions, cell.features)}
    # Perplexity per word, or of the last word, moves by another factor than per token.
    row["protocol:word"] = float("word" in cell.protocol)
    row["protocol:lambada"] = float("lambada" in cell.protocol.lower())
    return row


def fit(cells: list[Cell]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the coefficients and the families' effects."""
    rows = [_row(cell) for cell in cells]
    names = sorted({name for row in rows for name in row})
    families = sorted({cell.family for cell in cells})
    matrix = np.array(
        [[row.get(name, 0.0) for name in names] + [float(c.family == f) for f in families]
         for row, c in zip(rows, cells, strict=True)]
    )  # fmt: skip
    target = np.array([cell.target for cell in cells])
    zeros = [0.0] * len(families)
    prior = np.array([PRIORS.get(n, (0.0, 0.0))[0] for n in names] + zeros)
    penalty = np.array(
        [0.001 if n == "intercept" else PRIORS.get(n, (0.0, RIDGE))[1] for n in names]
        + [FAMILY_RIDGE] * len(families)
    )
    low = np.array(
        [0.0 if n in AT_LEAST_ZERO else -np.inf for n in names] + [-np.inf] * len(families)
    )
    high = np.array(
        [0.0 if n in AT_MOST_ZERO else np.inf for n in names] + [np.inf] * len(families)
    )
    # A table with dozens of cells counts less per cell; near-lossless cells are mostly noise.
    counts = Counter((c.source, c.model) for c in cells)
    weight = np.array([counts[c.source, c.model] ** -0.3 for c in cells])
    weight *= np.array([0.4 if c.log_ratio < 0.003 else 1.0 for c in cells])
    # A model that is gone is gone: by how much teaches nothing about the usable schemes.
    weight *= np.array([COLLAPSED_WEIGHT if c.log_ratio > 1.0 else 1.0 for c in cells])
    robust = np.ones(len(cells))
    solution = prior.copy()
    for _ in range(8):
        scaled = matrix * (weight * robust)[:, None]
        gram = matrix.T @ scaled + np.diag(penalty)
        goal = scaled.T @ target + penalty * prior
        solution = _bounded(gram, goal, low, high)
        residual = np.abs(target - matrix @ solution)
        robust = 1 / np.maximum(1.0, residual / 0.5)
    values = dict(zip(names, solution[: len(names)].tolist(), strict=True))
    effects = dict(zip(families, solution[len(names) :].tolist(), strict=True))
    return values, effects


def _bounded(gram: np.ndarray, goal: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Minimise a quadratic within bounds: fix what leaves them, free what pulls back in."""
    fixed = np.zeros(len(goal), dtype=bool)
    solution = np.zeros(len(goal))
    for _ in range(60):
        free = ~fixed
        part = np.linalg.solve(
            gram[np.ix_(free, free)], goal[free] - gram[np.ix_(free, fixed)] @ solution[fixed]
        )
        outside = (part < low[free] - 1e-12) | (part > high[free] + 1e-12)
        solution[free] = np.clip(part, low[free], high[free])
        if outside.any():
            fixed[np.flatnonzero(free)[outside]] = True
            continue
        pull = goal - gram @ solution
        wrong = fixed & (
            ((solution <= low) & (pull > 1e-9)) | ((solution >= high) & (pull < -1e-9))
        )
        if not wrong.any():
            break
        fixed[np.flatnonzero(wrong)[np.argmax(np.abs(pull[wrong]))]] = False
    return solution


def evaluate(cell: Cell, values: dict[str, float], effect: float = 0.0) -> float:
    """Return the predicted log(log ratio)."""
    return effect + sum(values.get(name, 0.0) * value for name, value in _row(cell).items())


def cross_validate(cells: list[Cell]) -> list[tuple[Cell, float]]:
    """Predict every family from the others."""
    out = []
    for family in sorted({cell.family for cell in cells}):
        values, _ = fit([cell for cell in cells if cell.family != family])
        out += [(c, evaluate(c, values)) for c in cells if c.family == family]
    return out


def pairs(predicted: list[tuple[Cell, float]], margin: float) -> tuple[int, int]:
    """Count pairs of one model and table whose log ratios differ by ``margin``, and those right."""
    groups: dict[tuple[str, str, str], list[tuple[Cell, float]]] = defaultdict(list)
    for cell, value in predicted:
        groups[cell.model, cell.source, cell.protocol].append((cell, value))
    right = total = 0
    for group in groups.values():
        for i, (a, pa) in enumerate(group):
            for b, pb in group[:i]:
                if abs(a.log_ratio - b.log_ratio) > margin and a.features != b.features:
                    total += 1
                    right += (a.log_ratio > b.log_ratio) == (pa > pb)
    return right, total


def summary(predicted: list[tuple[Cell, float]]) -> dict[str, float]:
    """Return the scores of DESIGN: factor error, share within two, pairs, collapse."""
    kept = [(c, p) for c, p in predicted if c.log_ratio >= 0.003]
    errors = [
        abs(math.log(math.expm1(min(CAP, math.exp(p))) / math.expm1(min(CAP, c.log_ratio))))
        for c, p in kept
    ]
    r0, n0 = pairs(predicted, 0.0)
    r1, n1 = pairs(predicted, 0.01)
    sane = [(c, p) for c, p in predicted if c.log_ratio < 1.0]
    r2, n2 = pairs(sane, 0.01)
    collapsed = [(c.log_ratio > math.log(1.5), math.exp(p) > math.log(1.5)) for c, p in predicted]
    found = sum(a and b for a, b in collapsed)
    return {
        "cells": len(predicted),
        "median_factor": math.exp(float(np.median(errors))),
        "within_2x": float(np.mean([e < math.log(2) for e in errors])),
        "pairs_right": r0 / n0,
        "pairs_right_over_1_percent": r1 / n1,
        "pairs_right_not_collapsed": r2 / n2,
        "collapse_recall": found / sum(a for a, _ in collapsed),
        "collapse_precision": found / max(1, sum(b for _, b in collapsed)),
    }


def _correction(cell: Cell) -> str:
    return correction_key(cell.family, cell.key, cell.features)


def shrunken(predicted: list[tuple[Cell, float]]) -> dict[str, float]:
    """Return each family's own error per method and bits, shrunken by three cells of none."""
    errors: dict[str, list[float]] = defaultdict(list)
    for cell, value in predicted:
        if cell.family != "other":
            errors[_correction(cell)].append(float(np.clip(value - cell.target, -1, 1)))
    return {key: sum(found) / (len(found) + 3) for key, found in errors.items()}


def residuals(predicted: list[tuple[Cell, float]]) -> dict[str, float]:
    """Return a spread by class of bits: 90% of the cells lie within 1.645 of it."""
    out = {}
    for kind in ("2", "3", "4", "8"):
        errors = [abs(c.target - p) for c, p in predicted if c.key.endswith(kind)]
        out[kind] = round(float(np.quantile(errors, 0.9)) / 1.645, 3)
    return out


def _kl_and_accuracy() -> tuple[float, dict[str, float]]:
    kl, drops = [], []
    table: dict[tuple[str, ...], dict[str, float]] = defaultdict(dict)
    with (EVIDENCE / "accuracy.csv").open(encoding="utf-8") as handle:
        for row in csv.DictReader(handle):
            key = tuple(
                row[k] for k in ("model", "method", "bits", "group_size", "variant", "source")
            )
            if not row["quantized_value"]:
                continue
            value = float(row["quantized_value"])
            if row["metric"] == "kld_mean":
                table[key]["kl"] = value
            elif row["baseline_value"]:
                base = float(row["baseline_value"])
                if "ppl" in row["metric"] and row["metric"] != "ppl_ratio":
                    table[key]["loss"] = math.log(value / base)
                elif row["metric"].startswith(("zeroshot", "mmlu", "openllm")) and base > 1.5:
                    table[key].setdefault("drop", (base - value) / 100)
    for entry in table.values():
        if entry.get("loss", 0) > 0.004:
            if "kl" in entry:
                kl.append(entry["kl"] / entry["loss"])
            if "drop" in entry and entry["loss"] < 0.7:
                drops.append(entry["drop"] / entry["loss"])
    print(
        "kl/loss",
        len(kl),
        kl and np.median(kl),
        "drop/loss",
        len(drops),
        drops and np.median(drops),
    )
    return (float(np.median(kl)) if kl else 1.0), {
        "slope": round(float(np.median(drops)) if drops else 0.15, 3), "most": 0.35,
    }  # fmt: skip


def main() -> None:
    """Fit, score by cross-validation, write the coefficients."""
    cells = load_cells()
    values, effects = fit(cells)
    inside = [(c, evaluate(c, values, effects[c.family])) for c in cells]
    outside = cross_validate(cells)
    print("fitted         ", summary(inside))
    print("cross-validated", summary(outside))
    print(residuals(inside), residuals(outside), effects)
    names: list[str] = []
    sources: dict[str, list[int]] = {}
    for key in sorted({c.key for c in cells}):
        top = Counter(c.source for c in cells if c.key == key).most_common(3)
        for name, _ in top:
            if name not in names:
                names.append(name)
        sources[key] = [names.index(name) for name, _ in top]
    kl, accuracy = _kl_and_accuracy()
    spread = float(np.std([e for f, e in effects.items() if f != "other"]))
    effects.pop("other", None)
    values = {k: v for k, v in values.items() if not k.startswith("protocol:")}
    corrections = shrunken(inside)
    inside = [(c, p - corrections.get(_correction(c), 0.0)) for c, p in inside]
    document = {
        "fitted_by": "tests/bench/fit_loss.py",
        "cells": len(cells),
        "cross_validated_by_family": {k: round(float(v), 4) for k, v in summary(outside).items()},
        "coefficients": {
            **ASSUMED,
            **{k: round(v, 5) for k, v in values.items() if k not in ASSUMED and v},
        },
        "families": {k: round(v, 4) for k, v in {**effects, **ASSUMED_FAMILIES}.items()},
        "residual": residuals(inside),
        "family_spread": round(max(0.3, spread), 3),
        "collapse_threshold": 0.5,
        "kl_per_loss": round(kl, 3),
        "accuracy_per_loss": accuracy,
        "corrections": {k: round(-v, 3) for k, v in corrections.items() if abs(v) > 0.05},
        "source_names": names,
        "sources": sources,
    }
    text = "# Fitted by tests/bench/fit_loss.py; log(log(perplexity ratio)) of published tables.\n"
    (EVIDENCE / "loss.yaml").write_text(text + yaml.safe_dump(document, sort_keys=False, width=100))


if __name__ == "__main__":
    main()
