"""Measure candidates on every evaluation sequence, for the tests that resample real measurements.

``python tests/bench/measured_sequences.py`` writes tests/golden/measured_sequences.json: KL and
log-loss of each sequence for eight candidates of the small trained model, four of them neighbours
on the frontier of mixtures, as a search measures them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from advisor.calibration.collect import collect_statistics, open_store
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.plan.folders import cache_root
from advisor.schemes import parse_scheme
from advisor.search.realise import realise
from advisor.workflows.texts import draw

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "tests" / "golden" / "measured_sequences.json"
UNIFORM = (
    "gptq-int4-g64-sym", "gptq-int4-g64-asym", "awq-int4-g64-asym", "rtn-int4-g64-sym",
)  # fmt: skip
MIXED = (0.1, 0.2, 0.3, 0.4)
"""Shares of the modules, spread evenly, that take three bits instead of four."""


def main() -> None:
    loaded = load_model(ROOT / "examples" / "tiny-llama")
    texts = {
        role: draw((f"builtin:{role}",), loaded.tokenizer, role=role, sequences=32,
                   sequence_length=128, seed=0, most=most)
        for role, most in (("calibration", 32), ("evaluation", 100_000))
    }  # fmt: skip
    store = open_store(loaded, texts["calibration"])
    collect_statistics(loaded, texts["calibration"], store)
    reference = Reference.compute(loaded, texts["evaluation"], cache_root())
    names = [linear.name for linear in loaded.linears]
    candidates = {name: dict.fromkeys(names, parse_scheme(name)) for name in UNIFORM}
    for share in MIXED:
        few = {name for i, name in enumerate(names) if int((i + 1) * share) > int(i * share)}
        candidates[f"mixed-{share:g}"] = {
            name: parse_scheme(f"gptq-int{3 if name in few else 4}-g64-asym") for name in names
        }
    settings = QuantizationSettings(static_groups=True, scale_steps=8)
    found = {}
    for name, assignment in candidates.items():
        made = realise(loaded, assignment, settings, store)
        with quantized_model(loaded.model, made.weights, made.replaced) as model:
            measured = measure(model, reference)
        sys.stderr.write(f"{name}: KL {measured.kl.value:.5f}, loss {measured.loss.value:.4%}\n")
        found[name] = {
            "kl": [float(f"{value:.6g}") for value in measured.sequence_kl],
            "difference": [
                float(f"{value:.6g}")
                for value in measured.sequence_nll - measured.sequence_reference_nll
            ],
        }
    TARGET.write_text(json.dumps({"model": "examples/tiny-llama", "tokens": 128, **{
        "candidates": found}}, indent=None) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
