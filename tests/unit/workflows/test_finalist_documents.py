"""What ``tune`` says of its finalists, in the document and on a terminal."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from advisor.budgets import Budgets
from advisor.cli.tune import _finalists
from advisor.evaluation.gate import decide
from advisor.evaluation.measure import Measurement
from advisor.plan.files import load_plan
from advisor.schemes import parse_scheme
from advisor.search.families import Family
from advisor.search.finalists import Finalist, ScoreQuality
from advisor.search.goal import goal_of
from advisor.search.mixture import Mixture
from advisor.search.results import TuneResult
from advisor.workflows.finalist_documents import finalist_document, in_order, why

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.yaml"


def finalist(name, kl, size):
    spread = np.random.default_rng(0).standard_normal(32)
    values = np.maximum(1e-9, kl * (1 + 0.1 * spread))
    measured = Measurement(values, 3.0 + values * spread, np.full(32, 3.0), np.ones(32))
    scheme = parse_scheme("gptq-int4-g64-sym")
    mixture = Mixture(name, Family("gptq"), {name: scheme}, size, 4.5, kl)
    return Finalist(mixture, measured, decide(measured, Budgets()))


@pytest.fixture
def result():
    # Alike in all that is measured: the mixture is one scheme under two names.
    rows = (
        finalist("mixed-4.16bpw", 0.002, 1000),
        finalist("gptq-int4-gch-sym", 0.002, 1000),
        finalist("gptq-int4-g64-sym", 0.001, 1100),
    )
    plan = load_plan(GOLDEN)
    expected = plan.expected.model_copy(
        update={"kl": rows[0].measurement.kl, "size_bytes": 1000, "loss": rows[0].measurement.loss}
    )
    scheme = plan.scheme.model_copy(update={"name": rows[0].name})
    plan = plan.model_copy(update={"expected": expected, "scheme": scheme})
    goal = goal_of(Budgets(), "balanced", None)
    return TuneResult(plan, rows, (), True, (), ScoreQuality(None, None), goal, 1.0, answer=rows[0])


def test_one_row_is_the_answer_however_alike_another_is(result):
    rows = [finalist_document(row, result) for row in in_order(result)]
    assert [row["chosen"] for row in rows] == [True, False, False]
    assert rows[0]["name"] == "mixed-4.16bpw"


def test_an_assumed_budget_is_said_and_the_smallest_boasts_of_bytes(result):
    words = why(result)
    assert words.startswith("the smallest within 1% of perplexity, which is aimed at where no")
    assert words.endswith("as many bytes as the smallest uniform one that does (gptq-int4-gch-sym)")
    given = replace(result, goal=goal_of(Budgets(max_loss=0.03), "balanced", None))
    assert why(given).startswith("the smallest that meets the budgets: as many bytes as")
    narrow, _, best = result.finalists
    larger = replace(given, finalists=(narrow, best))
    assert why(larger).endswith(
        "9.1% fewer bytes than the smallest uniform one that does (gptq-int4-g64-sym)"
    )
    failing = replace(best, decision=decide(best.measurement, Budgets(max_kl=1e-9)))
    assert why(replace(given, finalists=(narrow, failing))) == (
        "the smallest that meets the budgets: the only uniform one that was measured does not"
    )
    assert why(replace(given, finalists=(narrow,))) == (
        "the smallest that meets the budgets, the only one that was measured"
    )
    least = replace(result, goal=goal_of(Budgets(max_size_bytes=1000), "balanced", 1000))
    assert why(least).startswith("the least loss that fits: 2.00 times the KL of the best uniform")


def test_a_uniform_one_that_ended_early_is_compared_on_what_it_was_measured_on(result):
    mixture, _, best = result.finalists
    first = mixture.measurement.first(8)
    kl = np.concatenate([first.sequence_kl, np.full(24, 9.0)])
    answer = replace(mixture, measurement=replace(mixture.measurement, sequence_kl=kl))
    ended = replace(best, measurement=best.measurement.first(8), planned=32)
    assert not ended.in_full
    goal = goal_of(Budgets(max_size_bytes=1000), "balanced", 1000)
    words = why(replace(result, goal=goal, finalists=(answer, ended), answer=answer))
    assert words == (
        "the least loss that fits: 2.00 times the KL of the best uniform one (gptq-int4-g64-sym) "
        "with 9.1% fewer bytes, on the 8 sequences that were enough to tell"
    )


@pytest.mark.parametrize(("width", "gone"), [(140, ()), (110, ("bits", "top-1"))])
def test_finalists_take_one_line_each_at_usual_widths(result, width, gone):
    console = Console(width=width, record=True, file=SimpleNamespace(write=len, flush=int))
    rows = [finalist_document(row, result) for row in in_order(result)]
    long = rows[0] | {
        "method": "gptq", "sequential": True, "name": "gptq-int4-g64-asym",
        "size_bytes": 118_000_000,
        "kl": {"value": 0.00103, "low": 0.00094, "high": 0.00111},
        "loss": {"value": -0.0007, "low": -0.00384, "high": 0.00245},
    }  # fmt: skip
    _finalists(console, [long, *rows[1:]], max_bytes=1_000_000_000)
    heading, _, *lines = console.export_text().rstrip().splitlines()
    assert len(lines) == len(rows)
    assert [name for name in ("bits", "top-1") if name not in heading] == list(gone)
    assert "-0.070% [-0.384, 0.245]" in lines[0]


def test_what_is_larger_than_the_budget_does_not_pass(result):
    console = Console(width=140, record=True, file=SimpleNamespace(write=len, flush=int))
    rows = [finalist_document(row, result) for row in in_order(result)]
    _finalists(console, rows, max_bytes=1050)
    _, _, *lines = console.export_text().rstrip().splitlines()
    assert [line.split()[-1] for line in lines] == ["pass", "large", "pass"]
