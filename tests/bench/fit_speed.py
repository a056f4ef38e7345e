"""Search the coefficients of profiles/evidence/speed.yaml that fit the published speeds best.

Run as ``python tests/bench/fit_speed.py vllm``: prints better values, model by model held out;
the file is edited by hand, since few points stand behind some of the kernels.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys

import speed_facts

from advisor.plan.data import data_folders
from advisor.predict.speed_data import load_coefficients

SEARCHED = {
    "vllm": ("step_us", "16-bit.efficiency", "16-bit.layer_us", "marlin.efficiency",
             "marlin.layer_us", "marlin.ramp_8bit"),
    "transformers": ("cache_factor", "16-bit.layer_us", "marlin.layer_us", "marlin.efficiency",
                     "16-bit.efficiency", "bnb-4bit.layer_us"),
    "llama.cpp": ("step_us", "16-bit.efficiency", "16-bit.layer_us", "gguf.efficiency",
                  "gguf.layer_us"),
}  # fmt: skip


def _get(engine: object, name: str) -> float:
    head, _, tail = name.rpartition(".")
    owner = engine.kernels[head] if head else engine  # type: ignore[attr-defined]
    return float(getattr(owner, tail))


def _with(engine: object, name: str, value: float) -> object:
    head, _, tail = name.rpartition(".")
    if not head:
        return dataclasses.replace(engine, **{tail: value})  # type: ignore[type-var]
    kernels = dict(engine.kernels)  # type: ignore[attr-defined]
    kernels[head] = dataclasses.replace(kernels[head], **{tail: value})
    return dataclasses.replace(engine, kernels=kernels)  # type: ignore[type-var]


def _error(points: list[speed_facts.Point]) -> float:
    errors = [abs(math.log(p.predicted / p.measured)) for p in points]
    return sum(min(error, 1.0) for error in errors) / len(errors)


def fit(name: str, *, without: str | None = None, rounds: int = 60) -> float:
    """Search from the shipped coefficients; returns the error on the model left out, or on all."""
    table = load_coefficients(data_folders("evidence"))
    original = table[name]
    rng = random.Random(0)
    best = original

    def points(engine: object, held_out: bool) -> list[speed_facts.Point]:
        table[name] = engine  # type: ignore[assignment]
        found = [p for p in speed_facts.load_points((name,)) if p.trusted]
        if without is None:
            return found
        return [p for p in found if (p.model == without) == held_out]

    lowest = _error(points(best, False))
    for _ in range(rounds):
        field = rng.choice(SEARCHED[name])
        trial = _with(best, field, _get(best, field) * math.exp(rng.gauss(0, 0.25)))
        if "efficiency" in field and _get(trial, field) > 0.95:
            continue
        error = _error(points(trial, False))
        if error < lowest:
            best, lowest = trial, error
    result = _error(points(best, True))
    if without is None:
        for field in SEARCHED[name]:
            print(f"{field}: {_get(original, field):.3g} -> {_get(best, field):.3g}")
    table[name] = original
    return result


if __name__ == "__main__":
    print(fit(sys.argv[1], rounds=int(sys.argv[2]) if len(sys.argv) > 2 else 60))
