"""Growing texts, slices and benchmarks: what is measured when, and what decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advisor.budgets import Budgets
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.evaluation.gate import decide
from advisor.evaluation.intervals import mean_interval
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.families import Family
from advisor.search.goal import goal_of
from advisor.search.judges import Judges
from advisor.search.measuring import Measurer
from advisor.search.mixture import Mixture
from advisor.search.refine import Refiner


def _sequences(seed, count, length=24):
    tokens = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


class Coin:
    """A benchmark whose answers depend on the weights: the sign of a few logits."""

    name, identity = "coin", "coin-1"

    def __init__(self):
        self.runs = 0

    def evaluate(self, model, progress=None):
        self.runs += 1
        with torch.no_grad():
            logits = model(torch.arange(2, 42)[None]).logits[0]
        return (logits[:, 5] > logits[:, 6]).double().numpy()


@pytest.fixture
def make(random_llama, tmp_path):
    calibration = _sequences(1, 8)
    store = open_store(random_llama, calibration, root=tmp_path / "cache")
    collect_statistics(random_llama, calibration, store)

    def build(budgets, judges, reference_limit=None):
        return Measurer(
            random_llama, store, judges, QuantizationSettings(),
            goal_of(budgets, "balanced", None), tmp_path / "finalists", tmp_path / "cache",
            calibration, reference_limit,
        )  # fmt: skip

    return build


def _mixture(loaded, name, size=1000):
    assignment = {linear.name: parse_scheme(name) for linear in loaded.linears}
    return Mixture(name, Family("gptq"), assignment, size, 4.5, 0.01)


def test_text_that_the_disk_has_no_room_for_is_not_measured(random_llama, make):
    pool = _sequences(3, 20)
    vocabulary = random_llama.model.config.vocab_size
    room = 8 * 23 * vocabulary * 2  # what the model predicts of eight sequences
    grown = make(Budgets(max_kl=1e-9), Judges(pool, 4), room)
    found = grown.measure(_mixture(random_llama, "gptq-int4-g32-sym"))
    assert grown.can_grow(found)
    found = grown.extend(found)
    assert found.measurement.sequences == 8
    assert not grown.can_grow(found)
    assert not make(Budgets(max_kl=1e-9), Judges(pool, 4), room - 1).can_grow(
        make(Budgets(max_kl=1e-9), Judges(pool, 4)).measure(found.mixture)
    )


def test_a_grown_measurement_is_one_of_all_its_sequences(random_llama, make):
    pool = _sequences(3, 20)
    grown = make(Budgets(max_kl=1e-9), Judges(pool, 4))
    mixture = _mixture(random_llama, "gptq-int4-g32-sym")
    found = grown.measure(mixture)
    assert [found.measurement.sequences, grown.judges.looks] == [4, 4]
    sizes = []
    while grown.can_grow(found):
        found = grown.extend(found)
        sizes.append(found.measurement.sequences)
    assert sizes == [8, 16, 20], "doubled, and what is left at the end"
    whole = make(Budgets(max_kl=1e-9), Judges(pool, 20)).measure(mixture)
    np.testing.assert_array_equal(whole.measurement.sequence_kl, found.measurement.sequence_kl)
    assert grown.finalists == [found]


def test_slices_are_gated_apart(random_llama, make):
    mixture = _mixture(random_llama, "gptq-int4-g32-sym")
    main, other = _sequences(3, 8), _sequences(4, 8)
    plain = make(Budgets(max_kl=1.0), Judges(main, 8)).measure(mixture)
    alone = make(Budgets(max_kl=1.0), Judges(other, 8)).measure(mixture)
    limit = plain.measurement.kl.high * 1.2
    measurer = make(Budgets(max_kl=limit), Judges(main, 8, {"other": other}))
    found = measurer.measure(mixture)
    np.testing.assert_array_equal(found.slices["other"].sequence_kl, alone.measurement.sequence_kl)
    texts = (plain.measurement.sequence_kl, alone.measurement.sequence_kl)
    assert found.kl_high == max(mean_interval(text, found.confidence).high for text in texts)
    stricter = alone.measurement.kl.low * 0.9
    strict = decide(alone.measurement, Budgets(max_kl=stricter), slices={})
    assert strict.verdict == "fail"
    mixed = decide(plain.measurement, Budgets(max_kl=stricter), slices={"x": alone.measurement})
    assert "KL on x" in mixed.reason
    assert mixed.verdict == "fail"


def test_benchmark_is_run_once_per_model(random_llama, make):
    coin = Coin()
    budgets = Budgets(max_accuracy_drop=0.5, task="coin")
    judges = Judges(_sequences(3, 4), 4, benchmark=coin)
    measurer = make(budgets, judges)
    measurer.prepare()
    first = measurer.measure(_mixture(random_llama, "rtn-int2-g32-asym"))
    assert coin.runs == 2
    assert first.task.reference.shape == (40,)
    assert first.task.drop.high > 0
    again = make(budgets, judges).measure(_mixture(random_llama, "rtn-int2-g32-asym"))
    assert coin.runs == 2, "scores of both models come from disk"
    np.testing.assert_array_equal(again.task.scores, first.task.scores)


def _refiner(measurer, budgets):
    return Refiner(
        composer=None, measurer=measurer, goal=goal_of(budgets, "balanced", None), families=(),
        stop=lambda: False, progress=lambda mixture: lambda done, total: None,
    )  # fmt: skip


def test_text_grows_until_the_decision_is_clear(random_llama, make):
    pool = _sequences(3, 64)
    mixture = _mixture(random_llama, "gptq-int4-g32-sym")
    whole = make(Budgets(max_kl=1.0), Judges(pool, 64)).measure(mixture).measurement
    first = make(Budgets(max_kl=1.0), Judges(pool, 8)).measure(mixture).measurement
    assert first.kl.high > whole.kl.high
    limit = (whole.kl.high + first.kl.high) / 2
    budgets = Budgets(max_kl=limit)
    measurer = make(budgets, Judges(pool, 8))
    before = measurer.measure(mixture)
    if before.decision.more_sequences is None:
        pytest.skip("the mean lies at the limit")
    assert before.decision.verdict == "undecided"
    _refiner(measurer, budgets).settle()
    (after,) = measurer.finalists
    assert after.measurement.sequences > 8
    assert after.passes


def test_text_that_cannot_be_enough_is_not_spent(random_llama, make):
    pool = _sequences(3, 12)
    mixture = _mixture(random_llama, "gptq-int4-g32-sym")
    mean = make(Budgets(max_kl=1.0), Judges(pool, 8)).measure(mixture).measured_kl
    budgets = Budgets(max_kl=mean * 1.02)
    measurer = make(budgets, Judges(pool, 8))
    before = measurer.measure(mixture)
    assert before.decision.verdict == "undecided"
    _refiner(measurer, budgets).settle()
    assert measurer.finalists == [before]
    assert "more sequences" in before.decision.reason
