"""Many cheap trials of the study, all scores known, beside one quantization of a library.

    python tests/bench/study_cost.py MODEL [--trials 200] [--max-size 118MB] [--engine vllm]
        [--library-seconds N]

Statistics and scores are taken from the cache ($ADVISOR_CACHE): a first study computes what is
missing there, a second one, with a database of its own, is measured: CPU seconds in one thread,
sampler, database, exact allocation and sizes. ``--library-seconds`` are the CPU seconds of a
library's quantization of the same model on the same tokens, measured elsewhere.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

from cpu_cost import cost, one_thread


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--max-size", default="118MB")
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--library-seconds", type=float)
    given = parser.parse_args()
    one_thread()
    rows = []
    for attempt in ("first, scores that were missing computed", "again, all scores known"):
        with tempfile.TemporaryDirectory() as work:
            rows.append((attempt, *_study(given, Path(work))))
    print("| study | trials | rejected by arithmetic | distinct candidates | CPU s | ms a trial |")
    print("|---|---|---|---|---|---|")
    for attempt, trials, rejected, distinct, seconds in rows:
        print(f"| {attempt} | {trials} | {rejected} | {distinct} | {seconds:.1f} "
              f"| {1000 * seconds / trials:.0f} |")  # fmt: skip
    if given.library_seconds:
        print(f"\nOver the library's quantization ({given.library_seconds:.0f} CPU s): "
              f"{rows[-1][-1] / given.library_seconds:.3f}")  # fmt: skip


def _study(given: argparse.Namespace, work: Path) -> tuple[int, int, int, float]:
    """Run the trials of a search; return (trials, rejected, distinct candidates, CPU seconds)."""
    from advisor.budgets import Budgets
    from advisor.calibration.sources import collect, open_statistics
    from advisor.engines.options import mixture_options
    from advisor.models.load import load_model
    from advisor.plan.folders import cache_root
    from advisor.predict.models import load_modelspec
    from advisor.search.aim import aim
    from advisor.search.clock import Clock
    from advisor.search.compose import Composer
    from advisor.search.effort import FULL
    from advisor.search.judges import Judges
    from advisor.search.planning import Task
    from advisor.search.run import Run
    from advisor.search.scores import ScoreBook
    from advisor.search.space import usual_families
    from advisor.search.trials import Scorer, scoring_allowance
    from advisor.search.workers import storage_url
    from advisor.workflows.resolve import resolve_hardware
    from advisor.workflows.texts import draw

    loaded, spec = load_model(given.model), load_modelspec(given.model)
    hardware = resolve_hardware(given.gpu)
    texts = {
        role: draw((), loaded.tokenizer, role=role, sequences=given.samples,
                   sequence_length=given.length, seed=0)
        for role in ("calibration", "evaluation")
    }  # fmt: skip
    offered = mixture_options(given.engine, hardware, spec.linears)
    settings = FULL.settings
    judges = Judges(texts["evaluation"], given.samples)
    task = Task(loaded, spec, hardware, given.engine, Budgets.from_text(max_size=given.max_size),
                texts["calibration"], judges, 2048, 1, offered.format, settings)  # fmt: skip
    run = Run(task, offered, work, lambda event: None, Clock(None, lambda: False), 0.0)
    store = open_statistics(loaded, texts["calibration"])
    collect(loaded, texts["calibration"], store, lambda done, total: None)
    book = ScoreBook(loaded, store, cache_root() / "scores")
    composer = Composer(spec, loaded.linears, offered, book, settings)
    with cost() as spent:
        _, goal, space = aim(
            task, offered, composer, (), prefer="balanced", pace=None, prefixes=store.prefixes
        )
        further = len(space.mixes) + len(space.rotations) - 2
        scorer = Scorer(composer, space, goal,
                        scoring_allowance(spec.quantizable_parameters, further),
                        lambda family, done, total: None,
                        usual=usual_families(space))  # fmt: skip
        run.study = f"bench-{time.time_ns()}"
        run._trials(scorer, storage_url(None, work), given.trials, 0)
    rejected = sum(record.rejected is not None for record in run.records)
    made = Counter(
        (record.attributes["name"], str(record.attributes["family"]))
        for record in run.records if record.rejected is None
    )  # fmt: skip
    return len(run.records), rejected, len(made), spent.cpu_s


if __name__ == "__main__":
    main()
