"""Which mixtures of other methods are measured beside the best one."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import pytest

from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.families import Family
from advisor.search.goal import Goal
from advisor.search.hopeless import best_by_score, known_kl, not_far_behind
from advisor.search.mixture import Mixture
from advisor.search.refine import Refiner
from advisor.search.score import Score


def mixture(method, score, names):
    assignment = {f"m{index}": parse_scheme(name) for index, name in enumerate(names)}
    return Mixture("mixed-4.5bpw", Family(method, True), assignment, 1000, 4.5, score)


LEADER = mixture("gptq", 0.04, ["nvfp4"] * 4 + ["gptq-int4-g32-sym"] * 4 + ["bf16"] * 2)


@pytest.mark.parametrize(
    ("score", "names", "measured"),
    [
        # the same four modules in NVFP4: what is left says little
        (0.041, ["nvfp4"] * 4 + ["awq-int4-g32-sym"] * 6, False),
        (0.041, ["nvfp4"] * 3 + ["awq-int4-g32-sym"] * 7, True),
        # integers of two methods are never alike, and 16 bits do not count
        (0.041, ["awq-int4-g32-sym"] * 8 + ["bf16"] * 2, True),
        (0.041, ["awq-int8-g32-sym"] * 3 + ["nvfp4"] * 1 + ["bf16"] * 6, True),
        (0.081, ["awq-int4-g32-sym"] * 10, False),
    ],
)
def test_others_are_measured_where_they_may_be_the_answer(score, names, measured):
    other = mixture("awq", score, names)
    assert (other in not_far_behind([LEADER, other], [LEADER])) is measured
    assert LEADER in not_far_behind([LEADER, other], [LEADER])


class _Book:
    """Scores of two schemes, 0.01 and 0.03 for every module."""

    known: ClassVar = {parse_scheme("nvfp4"): 0.01, parse_scheme("mxfp4"): 0.03}

    def missing(self, schemes, settings, samples):
        return [scheme for scheme in schemes if scheme not in self.known]

    def scores(self, schemes, settings, samples):
        return {s: {f"m{i}": Score(self.known[s], 1.0) for i in range(10)} for s in schemes}


def offer(name):
    assignment = {f"m{index}": parse_scheme(name) for index in range(10)}
    return Mixture(name, Family(name, True), assignment, 900, 4.5, 0.0, published_loss=0.01)


@pytest.mark.parametrize(
    ("smallest", "measured"),
    # Measured KL is half of what scores say: mxfp4 would have 0.15, twice 0.05 and more; of
    # bnb-nf4 nothing is known.
    [(False, ["nvfp4", "bnb-nf4"]), (True, ["nvfp4", "mxfp4", "bnb-nf4"])],
)
def test_uniform_candidates_that_scores_rule_out_are_not_measured(smallest, measured):
    composer = SimpleNamespace(book=_Book(), settings=QuantizationSettings(), outer=())
    assert known_kl(composer, offer("mxfp4")) == pytest.approx(0.3)
    assert known_kl(composer, offer("bnb-nf4")) is None
    seen = []

    class Measurer:
        finalists: ClassVar = []

        def measure(self, candidate, progress):
            seen.append(candidate.name)
            found = SimpleNamespace(mixture=candidate, measured_kl=0.05, passes=False)
            self.finalists.append(found)
            return found

    goal = Goal(1000, None, 0.1, smallest)
    refiner = Refiner(composer, Measurer(), goal, [], lambda: False, lambda mixture: None)
    refiner._ratios["gptq"] = [math.log(0.5)]
    refiner.measure_offers([offer("nvfp4"), offer("mxfp4"), offer("bnb-nf4")])
    assert seen == measured


def test_the_best_uniform_candidate_is_the_one_that_scores_say():
    composer = SimpleNamespace(book=_Book(), settings=QuantizationSettings(), outer=())
    own = mixture("gptq", 0.15, ["gptq-int4-g32-sym"] * 10)
    offers = [offer("bnb-nf4"), offer("mxfp4"), offer("nvfp4")]

    def best(candidates, scale):
        found = best_by_score(composer, candidates, lambda family, kl: kl * scale[family.method])
        return None if found is None else next(iter(found.assignment.values())).method

    even = {"gptq": 1.0, "nvfp4": 1.0, "mxfp4": 1.0}
    assert best([own, *offers], even) == "nvfp4"  # 0.1 against 0.15 and 0.3
    assert best([own, *offers], even | {"gptq": 0.5}) == "gptq"
    assert best([offer("bnb-nf4")], even) == "bnb"  # nothing is known of any
    assert best([], even) is None
