"""Measure each method alone on one model, beside the 16-bit original: the README's table.

    python tests/bench/methods_table.py MODEL_FOLDER [PLAN.yaml ...] [--sequences 32] [--length 256]

Every row is quantized from the same calibration sequences, simulated with its run-time arithmetic
(activation quantization included), and judged on the same held-out sequences as ``advisor tune``
uses. Plans are added as rows of their own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.calibration.collect import collect_statistics, open_store
from advisor.evaluation.measure import Measurement, measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import LoadedModel, load_model
from advisor.plan.files import load_plan
from advisor.plan.folders import cache_root
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import Scheme, parse_scheme
from advisor.search.assignment import assignment_of, samples_of, settings_of
from advisor.search.realise import realise
from advisor.workflows.texts import draw

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.plan.schema import Interval

ROWS = (
    ("bf16", "safetensors"),
    ("rtn-int8-gch-sym", "compressed-tensors"),
    ("rtn-int8-gch-sym-aint8", "compressed-tensors"),
    ("smoothquant-int8-gch-sym-aint8", "compressed-tensors"),
    ("llm.int8", "bitsandbytes"),
    ("rtn-fp8-gch-afp8", "compressed-tensors"),
    ("rtn-int4-g32-sym", "compressed-tensors"),
    ("rtn-int4-g64-sym", "compressed-tensors"),
    ("awq-int4-g64-asym", "awq"),
    ("gptq-int4-g64-sym", "gptq"),
    ("gptq-int4-g64-sym-actorder", "gptq"),
    ("gptq-int4-g32-sym", "gptq"),
    ("bnb-nf4", "bitsandbytes"),
    ("bnb-nf4-dq", "bitsandbytes"),
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("plans", type=Path, nargs="*")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    loaded = load_model(given.model)
    shape = {"sequences": given.sequences, "sequence_length": given.length, "seed": 0}
    calibration = draw(("builtin:calibration",), loaded.tokenizer, role="calibration", **shape)
    evaluation = draw((), loaded.tokenizer, role="evaluation", **shape)
    store = open_store(loaded, calibration)
    collect_statistics(loaded, calibration, store)
    reference = Reference.compute(loaded, evaluation, cache_root())
    spec = load_modelspec(given.model)
    print("| scheme | bits | MB | KL, nats per token | perplexity | loss | top-1 |")
    print("|---|---|---|---|---|---|---|")
    for name, format_name in ROWS:
        scheme = parse_scheme(name)
        assignment = {linear.name: scheme for linear in loaded.linears}
        _row(loaded, spec, name, assignment, QuantizationSettings(), store, None, reference,
             format_name)  # fmt: skip
    for path in given.plans:
        plan = load_plan(path)
        _row(loaded, spec, plan.scheme.name, assignment_of(plan, loaded.linears),
             settings_of(plan), store, samples_of(plan), reference, plan.scheme.format)  # fmt: skip


def _row(
    loaded: LoadedModel,
    spec: object,
    name: str,
    assignment: Mapping[str, Scheme],
    settings: QuantizationSettings,
    store: object,
    samples: int | None,
    reference: Reference,
    format_name: str,
) -> None:
    start = time.perf_counter()
    realised = realise(loaded, assignment, settings, store, samples=samples)
    quantized_s = time.perf_counter() - start
    with quantized_model(loaded.model, realised.weights, realised.replaced):
        result: Measurement = measure(loaded.model, reference)
    chosen = {module: scheme for module, scheme in assignment.items() if scheme.is_quantized}
    size = checkpoint_size(spec, chosen, format_name)
    cells = [
        name,
        f"{size.bits_per_weight:.2f}",
        f"{size.total_bytes / 1e6:.0f}",
        _interval(result.kl),
        f"{result.perplexity:.2f}",
        _interval(result.loss, percent=True),
        _interval(result.top1, percent=True),
    ]
    print("|", " | ".join(cells), "|", flush=True)
    print(f"{name}: quantized in {quantized_s:.1f} s", file=sys.stderr, flush=True)


def _interval(value: Interval, *, percent: bool = False) -> str:
    factor, digits = (100, 2) if percent else (1, 4)
    unit = "%" if percent else ""
    return (
        f"{value.value * factor:.{digits}f}{unit} "
        f"[{value.low * factor:.{digits}f}, {value.high * factor:.{digits}f}]"
    )


if __name__ == "__main__":
    main()
