"""The tables of the grid at equal bytes: one row for a checkpoint and an engine, and what they say.

A ratio is our mean KL over theirs, on the same sequences, means over the seeds. Its interval is of
the sequences: they are drawn again with replacement, the same for both sides and all seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from advisor.evaluation.intervals import mean_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from equal_bytes_peers import Peer

_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Line:
    """A library's checkpoint beside our answer for one engine, over all seeds.

    Attributes:
        peer: The library's checkpoint.
        engine: What our answer is for.
        theirs: A row for each seed.
        ours: A row for each seed, in the same order.
        ratio: Of the mean KLs.
        low: Of the ratio's 95% interval.
        high: The same.
        seeds: The ratio of each seed alone.
    """

    peer: Peer
    engine: str
    theirs: tuple[dict[str, Any], ...]
    ours: tuple[dict[str, Any], ...]
    ratio: float
    low: float
    high: float
    seeds: tuple[float, ...]


def lines_of(
    rows: Sequence[dict[str, Any]], peers: Sequence[Peer], near: float = 0.001
) -> list[Line]:
    """Return every comparison that the rows allow, in the peers' order.

    Args:
        rows: Of peers and answers.
        peers: Which to compare with.
        near: Share of bytes by which an answer's limit may be below a peer's size.
    """
    found = []
    for peer in peers:
        made = [
            row for row in rows
            if row["kind"] == "peer" and "kl" in row
            and (row["library"], row["scheme"]) == (peer.library, peer.scheme)
        ]  # fmt: skip
        engines = dict.fromkeys(row["engine"] for row in rows if row["kind"] == "ours")
        for engine in engines:
            answers = [row for row in rows if row["kind"] == "ours" and row["engine"] == engine]
            seeds = dict.fromkeys(row["seed"] for row in answers)
            pairs = [
                (row, ours)
                for row in made
                for seed in ([row["seed"]] if peer.looks_at_text else seeds)
                if (ours := _answer(answers, seed, row["bytes"], peer, engine, near)) is not None
            ]
            if pairs:
                found.append(_line(peer, engine, pairs))
    return found


def _answer(
    answers: Sequence[dict[str, Any]], seed: int, limit: int, peer: Peer, engine: str, near: float
) -> dict[str, Any] | None:
    """Return our answer of a seed within a size; None where there is none."""
    if (peer.library == "llama.cpp") != (engine == "llama.cpp"):
        return None
    fitting = [
        row for row in answers
        if row["seed"] == seed and "kl" in row and limit * (1 - near) <= row["limit"] <= limit
    ]  # fmt: skip
    return max(fitting, key=lambda row: row["limit"], default=None)


def _line(peer: Peer, engine: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> Line:
    theirs, ours = zip(*pairs, strict=True)
    over = [row for row in ours if row["bytes"] > row["limit"]]
    if over:
        raise SystemExit(f"an answer is larger than its limit: {over[0]['limit']}")
    a = np.mean([row["kl"] for row in ours], axis=0)
    b = np.mean([row["kl"] for row in theirs], axis=0)
    picks = np.random.default_rng(0).integers(0, len(a), (_DRAWS, len(a)))
    drawn = a[picks].mean(1) / b[picks].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    alone = [float(np.mean(o["kl"]) / np.mean(t["kl"])) for t, o in pairs]
    return Line(
        peer, engine, theirs, ours, float(a.mean() / b.mean()), float(low), float(high),
        tuple(alone),
    )  # fmt: skip


def print_tables(
    rows: Sequence[dict[str, Any]], peers: Sequence[Peer], near: float = 0.001
) -> None:
    """Print all comparisons, summaries by engine and by level, and what is missing."""
    lines = lines_of(rows, peers, near)
    print(f"{len({row['seed'] for row in rows if row['kind'] == 'ours'})} calibration seeds\n")
    print("| bits | library | scheme | bytes | KL | perplexity | top-1 | for | bytes | KL "
          "| perplexity | top-1 | ratio | of each seed |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for line in sorted(lines, key=lambda line: (line.peer.level, line.peer.name, line.engine)):
        print("|", " | ".join(_cells(line)), "|")
    _print_summary(lines)
    _print_best(lines)
    _print_missing(rows)


def _cells(line: Line) -> list[str]:
    ratio = f"**{line.ratio:.2f}** [{line.low:.2f}, {line.high:.2f}]"
    return [
        f"{line.peer.level:g}", line.peer.library, line.peer.scheme, *_side(line.theirs),
        line.engine, *_side(line.ours), ratio, ", ".join(f"{one:.2f}" for one in line.seeds),
    ]  # fmt: skip


def _side(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return bytes, KL, perplexity and agreement with intervals over sequences."""
    kl = mean_interval(np.mean([row["kl"] for row in rows], axis=0))
    nll = mean_interval(np.mean([row["nll"] for row in rows], axis=0))
    reference = float(np.mean(rows[0]["reference_nll"]))
    worse = mean_interval(
        np.mean([row["nll"] for row in rows], axis=0) - np.array(rows[0]["reference_nll"])
    )
    top = mean_interval(np.mean([row["agreement"] for row in rows], axis=0))
    low, high = (math.exp(reference + bound) for bound in (worse.low, worse.high))
    return [
        f"{np.mean([row['bytes'] for row in rows]):,.0f}",
        f"{kl.value:#.3g} [{kl.low:#.3g}, {kl.high:#.3g}]",
        f"{math.exp(nll.value):.3f} [{low:.3f}, {high:.3f}]",
        f"{top.value:.2%} [{top.low:.2%}, {top.high:.2%}]",
    ]


def _print_summary(lines: Sequence[Line]) -> None:
    print("\n| ours for | beside | rows | ratio, geometric mean | least | worst | ours larger |")
    print("|---|---|---|---|---|---|---|")
    for engine in dict.fromkeys(line.engine for line in lines):
        own = [line for line in lines if line.engine == engine]
        groups = {"all": own, "uniform": [line for line in own if not line.peer.mixed],
                  "mixed": [line for line in own if line.peer.mixed]}  # fmt: skip
        for name, group in groups.items():
            if not group:
                continue
            ratios = [line.ratio for line in group]
            worst = max(group, key=lambda line: line.ratio)
            cells = [
                engine, name, str(len(group)), f"{_geometric(ratios):.2f}", f"{min(ratios):.2f}",
                f"{worst.ratio:.2f} ({worst.peer.name})", str(sum(one > 1 for one in ratios)),
            ]  # fmt: skip
            print("|", " | ".join(cells), "|")


def _print_best(lines: Sequence[Line]) -> None:
    """Print our ratio to the best uniform and the best mixed checkpoint of every level."""
    print("\n| bits | for | best uniform | ratio | best mixed | ratio |")
    print("|---|---|---|---|---|---|")
    for level in sorted({line.peer.level for line in lines}):
        for engine in dict.fromkeys(line.engine for line in lines):
            cells = [f"{level:g}", engine]
            for mixed in (False, True):
                own = [
                    line for line in lines
                    if (line.peer.level, line.engine, line.peer.mixed) == (level, engine, mixed)
                ]  # fmt: skip
                best = min(own, key=_their_kl, default=None)
                cells += ["", ""] if best is None else [
                    best.peer.name, f"{best.ratio:.2f} [{best.low:.2f}, {best.high:.2f}]"
                ]  # fmt: skip
            if any(cells[2:]):
                print("|", " | ".join(cells), "|")


def _print_missing(rows: Sequence[dict[str, Any]]) -> None:
    failed = [row for row in rows if "error" in row]
    infeasible = {(row["engine"], row["limit"], row["infeasible"]) for row in rows
                  if "infeasible" in row}  # fmt: skip
    if failed or infeasible:
        print()
    for row in failed:
        print(f"- {row['library']} {row['scheme']}, seed {row['seed']}: {row['error']}")
    for engine, limit, smallest in sorted(infeasible):
        print(f"- {engine}: nothing within {limit:,} bytes, the smallest has {smallest:,}")


def _their_kl(line: Line) -> float:
    return float(np.mean([row["kl"] for row in line.theirs]))


def _geometric(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
