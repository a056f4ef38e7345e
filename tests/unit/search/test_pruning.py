"""Early ends: what is hopeless, what is never stopped, and that nothing seen is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advisor.budgets import Budgets
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.evaluation.gate import decide
from advisor.evaluation.measure import Measurement
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search import measuring
from advisor.search.closing import complete_nearest
from advisor.search.early_ends import surely_above
from advisor.search.families import Family
from advisor.search.finalists import Finalist, choose
from advisor.search.goal import Goal, goal_of
from advisor.search.judges import Judges
from advisor.search.measuring import Measurer
from advisor.search.mixture import Mixture
from advisor.search.pruning import Watch
from advisor.search.refine import Refiner

WITHIN = Goal(None, None, None, smallest=False)


def _measurement(kl):
    values = np.asarray(kl, dtype=np.float64)
    return Measurement(values, 3.0 + values, np.full(len(values), 3.0), np.ones(len(values)))


def _mixture(name, size=100):
    return Mixture(name, Family("gptq"), {name: parse_scheme("rtn-int4-g32-sym")}, size, 4.5, 0.01)


def _finalist(name, kl, size=100, budgets=None):
    measured = _measurement(kl)
    return Finalist(_mixture(name, size), measured, decide(measured, budgets or Budgets()))


def _ends_after(watch, values):
    hopeless = watch.of_text("", len(values))
    for count in range(1, len(values) + 1):
        if hopeless(_measurement(values[:count])):
            return count
    return None


def _texts(spread, seed=0, count=32):
    return spread * np.random.default_rng(seed).random(count)


def test_a_candidate_that_is_surely_worse_is_stopped():
    easy_and_hard = 0.01 + _texts(0.05)
    rival = _finalist("mixed-4.50bpw", easy_and_hard)
    watch = Watch(_mixture("mixed-4.40bpw"), [rival], WITHIN)
    assert _ends_after(watch, easy_and_hard * 1.5) == 8, "pairing sees through the texts"
    assert watch.ended.reason.startswith("stopped early after ")
    assert "of 32 sequences: surely worse than mixed-4.50bpw" in watch.ended.reason
    better = Watch(_mixture("mixed-4.40bpw"), [rival], WITHIN)
    assert _ends_after(better, easy_and_hard * 0.8) is None


def test_equal_candidates_are_hardly_ever_stopped():
    generator = np.random.default_rng(1)
    stopped = 0
    for _ in range(200):
        base = generator.random(32)
        hopeless = surely_above((base + 0.1 * generator.standard_normal(32)).tolist())
        values = (base + 0.1 * generator.standard_normal(32)).tolist()
        stopped += any(hopeless(values[: count + 1]) for count in range(32))
    assert stopped <= 6, "0.4% at each of three looks"


def test_the_first_of_each_kind_is_measured_in_full():
    rival = _finalist("mixed-4.50bpw", 0.01 + _texts(0.001))
    bad = 1.0 + _texts(0.001)
    assert _ends_after(Watch(_mixture("mixed-4.40bpw"), [], WITHIN), bad) is None
    uniform = _mixture("gptq-int4-g64-sym")
    assert _ends_after(Watch(uniform, [rival], WITHIN), bad) is None
    quick = Watch(uniform, [rival], WITHIN, uniform_in_full=False)
    assert _ends_after(quick, bad) == 8
    other = _finalist("rtn-int4-g64-sym", 0.05 + _texts(0.001))
    watch = Watch(uniform, [rival, other], WITHIN)
    assert _ends_after(watch, bad) is not None
    assert "surely worse than rtn-int4-g64-sym" in watch.ended.reason, "uniform against uniform"


def test_a_budget_that_is_surely_broken_ends_a_measurement():
    budgets = Budgets(max_kl=0.02)
    goal = goal_of(budgets, "balanced", None)
    rival = _finalist("mixed-5.00bpw", 0.01 + _texts(0.001), 200, budgets)
    watch = Watch(_mixture("mixed-4.40bpw", 100), [rival], goal)
    assert 6 <= _ends_after(watch, 0.05 + _texts(0.01)) <= 10
    assert "the KL budget is surely broken" in watch.ended.reason
    near = Watch(_mixture("mixed-4.40bpw", 100), [rival], goal)
    assert _ends_after(near, 0.016 + _texts(0.009)) is None


def test_a_larger_rival_stops_nothing_where_the_smallest_is_wanted():
    budgets = Budgets(max_kl=0.2)
    goal = goal_of(budgets, "balanced", None)
    rival = _finalist("mixed-5.00bpw", 0.01 + _texts(0.001), 200, budgets)
    values = 0.05 + _texts(0.01)
    assert _ends_after(Watch(_mixture("mixed-4.40bpw", 100), [rival], goal), values) is None
    assert _ends_after(Watch(_mixture("mixed-5.10bpw", 210), [rival], goal), values) is not None


def _sequences(seed, count, length=24):
    tokens = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


@pytest.fixture
def make(random_llama, tmp_path):
    calibration = _sequences(1, 8)
    store = open_store(random_llama, calibration, root=tmp_path / "cache")
    collect_statistics(random_llama, calibration, store)

    def build(goal=WITHIN):
        return Measurer(
            random_llama, store, Judges(_sequences(3, 24), 24), QuantizationSettings(),
            goal, tmp_path / "finalists", tmp_path / "cache", calibration,
        )  # fmt: skip

    return build


def _real(loaded, name, scheme):
    assignment = {linear.name: parse_scheme(scheme) for linear in loaded.linears}
    return Mixture(name, Family("rtn"), assignment, 1000, 4.5, 0.01)


def test_what_was_seen_is_kept_and_completed(random_llama, make, monkeypatch):
    counted = []
    plain = measuring.measure

    def counting(*arguments, **changes):
        found = plain(*arguments, **changes)
        known = changes.get("known")
        counted.append(found.sequences - (0 if known is None else known.sequences))
        return found

    monkeypatch.setattr(measuring, "measure", counting)
    good = _real(random_llama, "mixed-8.00bpw", "rtn-int8-g32-sym")
    bad = _real(random_llama, "mixed-2.00bpw", "rtn-int2-g32-sym")
    first = make()
    first.measure(good)
    stopped = first.measure(bad)
    seen = stopped.measurement.sequences
    assert 6 <= seen < 24
    assert not stopped.in_full
    assert not stopped.passes
    assert stopped.decision.verdict == "stopped"
    assert f"after {seen} of 24 sequences" in stopped.decision.reason
    assert choose(first.finalists, WITHIN).mixture == good
    again = make()
    again.measure(good)
    assert again.measure(bad).measurement.sequences == seen
    assert counted == [24, seen], "both came from disk"
    whole = again.complete(again.finalists[1])
    assert whole.in_full
    assert counted == [24, seen, 24 - seen]
    alone = make()
    np.testing.assert_array_equal(
        alone.measure(bad).measurement.sequence_kl, whole.measurement.sequence_kl
    )


def test_the_nearest_to_the_budgets_is_measured_in_full(random_llama, make):
    """Nothing passes: what is named as the nearest must not rest on an early end."""
    goal = goal_of(Budgets(max_kl=1e-9), "balanced", None)
    measurer = make(goal)
    measurer.measure(_real(random_llama, "mixed-2.00bpw", "rtn-int2-g32-sym"))
    better = measurer.measure(_real(random_llama, "mixed-4.00bpw", "rtn-int4-g32-sym"))
    assert not better.in_full
    refiner = Refiner(
        composer=None, measurer=measurer, goal=goal, families=(), stop=lambda: False,
        progress=lambda mixture: lambda done, total: None,
    )  # fmt: skip
    complete_nearest(refiner)
    assert all(f.in_full for f in measurer.finalists)
    assert choose(measurer.finalists, goal).name == "mixed-4.00bpw"
