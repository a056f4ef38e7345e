"""Every library's checkpoints beside Advisor's answers in no more bytes: a grid of sizes and seeds.

    python tests/bench/equal_bytes_grid.py MODEL --work FOLDER [--seeds 0 1 2]
        [--library NAME ...] [--scheme NAME ...] [--engine NAME ...] [--ggml libggml-base.so]
        [--trials 40] [--effort full] [--not-sequential] [--table]

Libraries are those of ``advisor backends``, each in its environment; llama.cpp's block types are
made by its own quantizers (``libggml-base.so``, for example of libggml-python). A seed draws the
calibration sequences, the same for all libraries and for Advisor. The search measures its finalists
on 32 held-out sequences; what the table says is measured on others, of the same text, that no
choice has seen, for both sides from their files as they are read back.

Results are lines of JSON in FOLDER/rows.jsonl: a run goes on where a stopped one was. The tables
are printed in the end; ``--table`` prints them alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpu_cost import cost, one_thread
from equal_bytes import weight_bytes
from equal_bytes_peers import Peer, engines_for, make, peers_for
from equal_bytes_table import print_tables

from advisor.predict.models import load_modelspec

if TYPE_CHECKING:
    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.reference import Reference
    from advisor.models.load import LoadedModel

CHOSEN_ON = 32
"""Held-out sequences that the search may see."""


def main() -> None:
    """Make what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--library", action="append", help="only these")
    parser.add_argument("--scheme", action="append", help="only these")
    parser.add_argument("--engine", action="append", help="answers for these only")
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--ggml", type=Path)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--effort", default="full", help="of our searches: quick or full")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--judged", type=int, default=96, help="sequences that judge")
    parser.add_argument(
        "--near", type=float, default=0.001,
        help="an answer serves for limits larger by this share: fewer searches, a handicap for us",
    )  # fmt: skip
    parser.add_argument(
        "--not-sequential", action="store_true",
        help="answers are not refined in sequence: half of the time, a handicap for us",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    rows = Rows(given.work / "rows.jsonl")
    peers = peers_for(load_modelspec(given.model).linears)
    if not given.table:
        one_thread()
        logging.getLogger("advisor").setLevel(logging.ERROR)
        grid = Grid.open(given, rows)
        wanted = [
            peer for peer in peers
            if peer.library in (given.library or [peer.library])
            and peer.scheme in (given.scheme or [peer.scheme])
        ]  # fmt: skip
        for seed in given.seeds:
            grid.run(seed, wanted)
    print_tables(rows.of_effort(given.effort), peers, given.near)


class Rows:
    """Lines of JSON on disk."""

    def __init__(self, path: Path) -> None:
        """Read what is there."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.all: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **wanted: object) -> list[dict[str, Any]]:
        """Return the rows that have these values."""
        return [row for row in self.all if all(row.get(k) == v for k, v in wanted.items())]

    def of_effort(self, name: str) -> list[dict[str, Any]]:
        """Return the libraries' rows, and our answers of searches that spent so much."""
        return [
            row for row in self.all
            if row["kind"] == "peer" or row.get("effort", "full") == name
        ]  # fmt: skip

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row, and say so."""
        self.all.append(row)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")
        short = {key: value for key, value in row.items() if not isinstance(value, list)}
        mean = sum(row["kl"]) / len(row["kl"]) if "kl" in row else None
        print(json.dumps({**short, "mean_kl": mean}), file=sys.stderr, flush=True)


@dataclass(slots=True)
class Grid:
    """The model, its texts, and what is known already."""

    given: argparse.Namespace
    rows: Rows
    loaded: LoadedModel
    chosen_on: TokenSequences
    reference: Reference

    @classmethod
    def open(cls, given: argparse.Namespace, rows: Rows) -> Grid:
        """Load the model, and run it on the text that judges."""
        from advisor.evaluation.reference import Reference
        from advisor.models.load import load_model
        from advisor.plan.folders import cache_root
        from advisor.workflows.texts import draw

        loaded = load_model(given.model)
        held_out = draw(
            (), loaded.tokenizer, role="evaluation", sequences=CHOSEN_ON + given.judged,
            sequence_length=given.length, seed=0,
        )  # fmt: skip
        judged = held_out.part(CHOSEN_ON, held_out.sequences)
        reference = Reference.compute(loaded, judged, cache_root())
        return cls(given, rows, loaded, held_out.first(CHOSEN_ON), reference)

    def run(self, seed: int, peers: list[Peer]) -> None:
        """Make what a seed still lacks: the libraries' checkpoints, then our answers, by size."""
        from advisor.workflows.texts import draw

        calibration = draw(
            ("builtin:calibration",), self.loaded.tokenizer, role="calibration",
            sequences=self.given.samples, sequence_length=self.given.length, seed=seed,
        )  # fmt: skip
        limits: set[tuple[str, int]] = set()
        for peer in peers:
            row = self._peer(peer, seed, calibration)
            if "bytes" in row:
                engines = engines_for(peer, self.given.engine)
                limits |= {(engine, row["bytes"]) for engine in engines}
        for engine, limit in sorted(limits):
            self._answer(engine, limit, seed, calibration)

    def _peer(self, peer: Peer, seed: int, calibration: TokenSequences) -> dict[str, Any]:
        """Make and measure a checkpoint, or return what is known of it."""
        own = {"kind": "peer", "library": peer.library, "scheme": peer.scheme,
               "seed": seed if peer.looks_at_text else None}  # fmt: skip
        known = self.rows.find(**own)
        if known:
            return known[0]
        folder = self.given.work / f"{peer.name.replace(' ', '-')}-{own['seed']}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            size, seconds = make(peer, folder, self.loaded, calibration, self.given.ggml)
        except Exception as error:  # libraries fail in ways of their own; the row says how
            row = {**own, "error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        else:
            row = {**own, "bytes": size, "cpu_s": seconds, **self._measured(folder)}
            shutil.rmtree(folder)
        self.rows.add(row)
        return row

    def _answer(self, engine: str, limit: int, seed: int, calibration: TokenSequences) -> None:
        """Search, write the checkpoint, measure it, unless one of about the size is known."""
        near = [
            row for row in self.rows.of_effort(self.given.effort)
            if (row["kind"], row.get("engine"), row["seed"]) == ("ours", engine, seed)
            and limit * (1 - self.given.near) <= row["limit"] <= limit
        ]  # fmt: skip
        if near:
            return
        own = {"kind": "ours", "engine": engine, "limit": limit, "seed": seed,
               "effort": self.given.effort}  # fmt: skip
        smallest = self._smallest(engine)
        if smallest > limit:
            self.rows.add({**own, "infeasible": smallest})
            return
        folder = self.given.work / f"ours-{engine}-{limit}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        with cost() as spent:
            name = self._search(engine, limit, seed, calibration, folder)
        row = {**own, "name": name, "bytes": weight_bytes(folder), "cpu_s": spent.cpu_s,
               "sequential": not self.given.not_sequential}  # fmt: skip
        self.rows.add({**row, **self._measured(folder)})
        shutil.rmtree(folder)

    def _search(
        self, engine: str, limit: int, seed: int, calibration: TokenSequences, folder: Path
    ) -> str:
        """Tune as the command does and apply; return what was chosen."""
        import advisor
        from advisor.budgets import Budgets
        from advisor.plan.files import save_plan
        from advisor.search.effort import effort_named
        from advisor.search.tune import tune
        from advisor.workflows.resolve import resolve_hardware

        effort = effort_named(self.given.effort)
        work = self.given.work / f"{folder.name}.search"
        plan = work / "plan.yaml"
        result = tune(
            self.loaded, load_modelspec(self.given.model), resolve_hardware(self.given.gpu),
            engine, Budgets(max_size_bytes=limit), calibration=calibration,
            evaluation=self.chosen_on.first(effort.evaluation_sequences), workdir=work,
            trials=self.given.trials, seed=seed, context=2048,
            sequential=not self.given.not_sequential, effort=effort,
        )  # fmt: skip
        save_plan(result.plan, plan)
        advisor.apply(plan, folder, model=self.given.model)
        answer = result.plan.scheme.name
        shutil.rmtree(work)
        return answer

    def _smallest(self, engine: str) -> int:
        """Return the bytes of the smallest checkpoint that the search could choose."""
        from advisor.engines.options import mixture_options
        from advisor.methods.settings import QuantizationSettings
        from advisor.search.compose import Composer
        from advisor.workflows.resolve import resolve_hardware

        spec = load_modelspec(self.given.model)
        offered = mixture_options(engine, resolve_hardware(self.given.gpu), spec.linears)
        composer = Composer(spec, self.loaded.linears, offered, None, QuantizationSettings())
        return composer.smallest_and_largest()[0].total_bytes

    def _measured(self, folder: Path) -> dict[str, list[float]]:
        """Read a checkpoint as loaders do and judge it; results by sequence."""
        from advisor.evaluation.measure import measure
        from advisor.evaluation.runtime import quantized_model
        from advisor.formats.read import read_checkpoint
        from advisor.workflows.checkpoints import contents

        weights, replaced = contents(read_checkpoint(folder), self.loaded)
        with quantized_model(self.loaded.model, weights, replaced) as model:
            found = measure(model, self.reference)
        return {
            "kl": found.sequence_kl.tolist(),
            "nll": found.sequence_nll.tolist(),
            "reference_nll": found.sequence_reference_nll.tolist(),
            "agreement": found.sequence_agreement.tolist(),
        }


if __name__ == "__main__":
    main()
