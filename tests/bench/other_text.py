"""Uniform candidates calibrated on one text and judged on others: the README's table of texts.

    python tests/bench/other_text.py MODEL FILE [FILE ...] [--calibration TEXT ...]
        [--scheme NAME ...] [--sequences 24] [--length 256] [--plan PLAN.yaml]

Every scheme is quantized with the settings a full search starts from, from 32 sequences of each
calibration text, and judged on the first sequences of the built-in evaluation text and of every
file. Integers are also rounded to the nearest, without calibration. A plan's own assignment, on its
own calibration, is a row of its own.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cpu_cost import cost, one_thread

from advisor.calibration.sources import collect, open_statistics
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.plan.files import load_plan
from advisor.plan.folders import cache_root
from advisor.schemes import parse_scheme
from advisor.search.assignment import assignment_of, samples_of, settings_of
from advisor.search.effort import FULL
from advisor.search.families import USUAL_DAMPING, own_settings
from advisor.search.realise import realise
from advisor.workflows.texts import DEFAULT_TEXTS, draw, redraw

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel
    from advisor.schemes import Scheme

SCHEMES = ("gptq-int4-g32-asym", "gguf-q4_0", "bnb-nf4", "nvfp4")
SAMPLES = 32


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", nargs="+", help="files to judge on, beside the built-in text")
    parser.add_argument("--calibration", action="append", help="built-in texts, files or folders")
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--sequences", type=int, default=24, help="of each text that judges")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--plan", type=Path, action="append", default=[])
    given = parser.parse_args()
    one_thread()
    loaded = load_model(given.model)
    sources = ["builtin:evaluation", *given.texts]
    judges = [_text(loaded, name, "evaluation", given.sequences, given.length) for name in sources]
    references = [Reference.compute(loaded, judge, cache_root()) for judge in judges]
    print("|", " | ".join(["scheme", "calibrated on", *sources]), "|")
    print("|" + "---|" * (len(sources) + 2))
    settings = replace(FULL.settings, damping=USUAL_DAMPING, clip="mse", static_groups=True)
    for name in given.scheme or SCHEMES:
        scheme = parse_scheme(name)
        if scheme.is_integer:
            rounded = replace(scheme, method="rtn")
            _row(loaded, references, str(rounded), "none", _everywhere(loaded, rounded),
                 QuantizationSettings(), None)  # fmt: skip
    for source in given.calibration or ["builtin:calibration", DEFAULT_TEXTS["calibration"]]:
        calibration = _text(loaded, source, "calibration", SAMPLES, given.length)
        store = open_statistics(loaded, calibration)
        collect(loaded, calibration, store)
        for name in given.scheme or SCHEMES:
            scheme = parse_scheme(name)
            _row(loaded, references, name, source, _everywhere(loaded, scheme),
                 own_settings(scheme, settings), store)  # fmt: skip
    for path in given.plan:
        plan = load_plan(path)
        calibration = redraw(plan.calibration, loaded.tokenizer, "calibration")
        store = open_statistics(loaded, calibration)
        collect(loaded, calibration, store)
        _row(loaded, references, plan.scheme.name, plan.calibration.corpus,
             assignment_of(plan, loaded.linears), settings_of(plan), store, samples_of(plan),
             calibration)  # fmt: skip


def _text(loaded: LoadedModel, source: str, role: str, count: int, length: int) -> TokenSequences:
    return draw(
        (source,), loaded.tokenizer, role=role, sequences=count, sequence_length=length, seed=0
    )


def _everywhere(loaded: LoadedModel, scheme: Scheme) -> dict[str, Scheme]:
    return {linear.name: scheme for linear in loaded.linears}


def _row(
    loaded: LoadedModel,
    references: list[Reference],
    name: str,
    source: str,
    assignment: Mapping[str, Scheme],
    settings: QuantizationSettings,
    store: Statistics | None,
    samples: int | None = None,
    calibration: TokenSequences | None = None,
) -> None:
    """Quantize, judge on every text, print."""
    with cost() as spent:
        made = realise(
            loaded, assignment, settings, store, samples=samples, calibration=calibration
        )
    cells = []
    with quantized_model(loaded.model, made.weights, made.replaced) as model:
        for reference in references:
            kl = measure(model, reference).kl
            cells.append(f"{kl.value:.4f} [{kl.low:.4f}, {kl.high:.4f}]")
    print("|", " | ".join([name, source, *cells]), "|", flush=True)
    print(f"{name}: quantized in {spent.cpu_s:.0f} s of CPU", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
