"""Gap filling: sizes between what failed and what passed, on a landscape with a known edge."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from advisor.budgets import Budgets
from advisor.evaluation.gate import decide
from advisor.evaluation.measure import Measurement
from advisor.schemes import parse_scheme
from advisor.search.closing import MOST_FILLS, SMALLEST_GAP, fill_gap
from advisor.search.families import Family
from advisor.search.finalists import Finalist, choose
from advisor.search.goal import goal_of
from advisor.search.mixture import Mixture
from advisor.search.refine import Refiner

BUDGETS = Budgets(max_kl=0.05)
GPTQ = parse_scheme("gptq-int4-g64-sym")


def _mixture(size, family, name=None):
    """KL falls as the sixth power of size; the score is off by a factor that varies with it."""
    predicted = 0.05 * (1000 / size) ** 5
    return Mixture(name or f"mixed-{size}bpw", family, {f"m{size}": GPTQ}, size, 4.5, predicted)


class Toy:
    """A composer and a measurer: every size exists, KL is 0.05 at the size ``edge``."""

    def __init__(self, edge, noise=0.0):
        self.edge, self.noise = edge, noise
        self.finalists = []

    def smallest_and_largest(self):
        return SimpleNamespace(total_bytes=500), SimpleNamespace(total_bytes=4000)

    def mixture(self, family, limit, or_smallest=False):
        return _mixture(max(500, limit), family)

    def mixture_for(self, family, max_kl):
        return _mixture(int(np.ceil(1000 * (0.05 / max_kl) ** 0.2)), family)

    def measure(self, mixture, progress=None):
        kl = 0.05 * (self.edge / mixture.size_bytes) ** 6
        values = kl * (1 + self.noise * np.linspace(-1, 1, 16))
        measured = Measurement(values, values, values, values)
        self.finalists.append(Finalist(mixture, measured, decide(measured, BUDGETS)))
        return self.finalists[-1]

    def can_grow(self, finalist):
        return False

    def left(self, finalist):
        return 0


def _filled(toy, *sizes, family=None):
    family = family or Family("gptq")
    for size in sizes:
        toy.measure(_mixture(size, family))
    before = len(toy.finalists)
    refiner = Refiner(
        composer=toy, measurer=toy, goal=goal_of(BUDGETS, "balanced", None), families=(),
        stop=lambda: False, progress=lambda mixture: None,
    )  # fmt: skip
    fill_gap(refiner)
    return choose(toy.finalists, refiner.goal), len(toy.finalists) - before


@pytest.mark.parametrize("edge", [1010, 1100, 1190])
@pytest.mark.parametrize("noise", [0.0, 0.04])
def test_the_gap_between_failing_and_passing_is_closed(edge, noise):
    toy = Toy(edge, noise)
    answer, steps = _filled(toy, 1000, 1200)
    assert answer.passes
    assert 1 <= steps <= MOST_FILLS
    failing = [f.mixture.size_bytes for f in toy.finalists if not f.passes]
    gap = answer.mixture.size_bytes - max(failing)
    assert gap <= SMALLEST_GAP * answer.mixture.size_bytes or steps == MOST_FILLS
    assert answer.mixture.size_bytes <= edge * 1.03, "within 3% of the smallest that can pass"


def test_a_small_gap_is_left():
    _, steps = _filled(Toy(1000), 990, 1001)
    assert steps == 0


def test_other_families_failures_say_nothing():
    toy = Toy(1100)
    toy.measure(_mixture(1190, Family("rtn")))
    toy.finalists[0] = Finalist(
        toy.finalists[0].mixture, Measurement(*[np.full(8, 0.2)] * 4),
        decide(Measurement(*[np.full(8, 0.2)] * 4), BUDGETS),
    )  # fmt: skip
    answer, steps = _filled(toy, 1000, 1200)
    assert steps >= 1
    assert answer.mixture.size_bytes < 1190


def test_sequential_answers_are_filled_sequentially():
    toy = Toy(1100)
    _, steps = _filled(toy, 1000, 1200, family=Family("gptq", sequential=True))
    assert steps >= 1
    assert all(f.mixture.family.sequential for f in toy.finalists)


def test_nothing_passing_or_no_wish_for_the_smallest_measures_nothing():
    assert _filled(Toy(2000), 1000, 1200)[1] == 0
