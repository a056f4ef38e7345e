"""What scoring an option costs beside a whole GPTQ run, ours and gptqmodel's: a table.

    python tests/bench/scoring_cost.py MODEL [--samples 32] [--length 256] [--engine vllm]
        [--no-library]

CPU seconds in one thread, medians, all on the same calibration tokens. A GPTQ run of ours is
forward pass and codes (the search's own statistics, forward and backward, are a row of their own);
gptqmodel's is its ``quantize`` call, without imports, loading and saving. Scoring an option is a
share of one call that scores all of the engine's options of the method, for all modules.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cpu_cost import cost, one_thread

if TYPE_CHECKING:
    from advisor.calibration.store import StatisticsStore
    from advisor.models.load import LoadedModel

SCHEME = "gptq-int4-g64-sym"


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many is shown")
    parser.add_argument("--no-library", action="store_true")
    given = parser.parse_args()
    one_thread()
    from advisor.calibration.collect import collect_statistics, open_store
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import load_model
    from advisor.schemes import parse_scheme
    from advisor.search.realise import realise
    from advisor.workflows.texts import draw

    loaded = load_model(given.model)
    calibration = draw(
        (), loaded.tokenizer, role="calibration", sequences=given.samples,
        sequence_length=given.length, seed=0,
    )  # fmt: skip
    uniform = {linear.name: parse_scheme(SCHEME) for linear in loaded.linears}
    with tempfile.TemporaryDirectory() as name:
        plain = open_store(loaded, calibration, root=Path(name) / "plain", gradient="none")
        with cost() as forward:
            collect_statistics(loaded, calibration, plain, gradients=False, gradient="none")
        store = open_store(loaded, calibration, root=Path(name) / "full")
        with cost() as statistics:
            collect_statistics(loaded, calibration, store)
        codes = []
        for _ in range(given.repeat):
            with cost() as spent:
                realise(loaded, uniform, QuantizationSettings(), store)
            codes.append(spent.cpu_s)
        ours = forward.cpu_s + median(codes)
        rows = [("GPTQ run: forward pass and codes", ours), ("of it codes", median(codes)),
                ("statistics of the search, once", statistics.cpu_s)]  # fmt: skip
        theirs = None
        if not given.no_library:
            from library_cost import library_cost

            runs = [
                library_cost("gptqmodel", given.model, SCHEME, calibration)[0]["cpu_s"]
                for _ in range(given.repeat)
            ]
            theirs = median(runs)
            rows.append(("gptqmodel's GPTQ run", theirs))
        print("| what | options | CPU s | per option | over our run | over gptqmodel's |")
        print("|---|---|---|---|---|---|")
        for label, seconds in rows:
            print(f"| {label} | | {seconds:.2f} | | | |")
        for method in ("rtn", "gptq", "awq"):
            for symmetric in (True, False):
                _score(loaded, store, method, symmetric, given, ours, theirs)


def _score(
    loaded: LoadedModel,
    store: StatisticsStore,
    method: str,
    symmetric: bool,
    given: argparse.Namespace,
    ours: float,
    theirs: float | None,
) -> None:
    """Print what scoring a method's options of one grid costs."""
    from advisor.engines.options import mixture_options
    from advisor.search.effort import FULL
    from advisor.search.families import Family, schemes_of
    from advisor.search.scores import ScoreBook
    from advisor.workflows.resolve import resolve_hardware

    offered = mixture_options(given.engine, resolve_hardware(given.gpu), loaded.linears).schemes
    family = Family(method, symmetric, static_groups=method == "gptq")
    own = [s for s in schemes_of(family, offered, method) if s.method == method and s.is_quantized]
    own = [s for s in own if s.is_integer and s.activation is None]
    if not own:
        return
    settings = family.settings(FULL.settings)
    seconds = []
    for _ in range(given.repeat):
        with tempfile.TemporaryDirectory() as folder:
            book = ScoreBook(loaded, store, Path(folder))
            with cost() as spent:
                book.scores(own, settings, None)
        seconds.append(spent.cpu_s)
    each = median(seconds) / len(own)
    beside = "" if theirs is None else f"{each / theirs:.3f}"
    print(
        f"| {method}, {'sym' if symmetric else 'asym'} | {len(own)} | {median(seconds):.2f} "
        f"| {each:.3f} | {each / ours:.3f} | {beside} |", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
