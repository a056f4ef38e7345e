from __future__ import annotations

import math

import numpy as np
import pytest

from advisor.budgets import Budgets
from advisor.errors import InputError
from advisor.evaluation.gate import decide, look_confidence
from advisor.evaluation.intervals import bootstrap_interval, mean_interval, t_quantile
from advisor.evaluation.measure import Measurement


def measurement(differences, kl=None):
    differences = np.asarray(differences, dtype=np.float64)
    zeros = np.zeros_like(differences)
    return Measurement(zeros if kl is None else np.asarray(kl), differences, zeros, zeros + 1)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    [  # tables of Student's distribution
        (0.975, 1, 12.706204736), (0.975, 2, 4.302652730), (0.975, 7, 2.364624252),
        (0.95, 15, 1.753050356), (0.995, 31, 2.744041919), (0.975, 1000, 1.962339081),
        (0.025, 7, -2.364624252), (0.5, 3, 0.0),
    ],
)  # fmt: skip
def test_t_quantile_against_tables(probability, degrees, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_t_quantile_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 5, 10, 63, 255, 100000):
        for probability in (0.001, 0.2, 0.6, 0.9, 0.975, 0.9999):
            expected = stats.t.ppf(probability, degrees)
            assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_t_quantile_outside_its_range(probability, degrees):
    with pytest.raises(InputError):
        t_quantile(probability, degrees)


def test_mean_interval_by_hand():
    interval = mean_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446305 * math.sqrt(5 / 3) / 2
    assert interval.value == 2.5
    assert interval.high - 2.5 == pytest.approx(half, rel=1e-8)
    assert 2.5 - interval.low == pytest.approx(half, rel=1e-8)


def test_one_sequence_bounds_nothing():
    interval = mean_interval([1.0])
    assert (interval.low, interval.high) == (-math.inf, math.inf)
    with pytest.raises(InputError):
        mean_interval([])


def test_t_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(0)
    samples = generator.normal(1.0, 2.0, (4000, 6))
    covered = sum(interval.low <= 1.0 <= interval.high for interval in map(mean_interval, samples))
    assert covered / 4000 == pytest.approx(0.95, abs=0.012)


def test_bootstrap_agrees_with_t_for_many_sequences():
    values = np.random.default_rng(1).exponential(1.0, 400)
    ours, theirs = bootstrap_interval(values), mean_interval(values)
    assert ours.low == pytest.approx(theirs.low, abs=0.02)
    assert ours.high == pytest.approx(theirs.high, abs=0.02)
    assert bootstrap_interval(values) == ours


def test_loss_is_paired():
    # Sequences differ by nats, the two models by a hundredth: pairing sees it.
    base = np.linspace(1.0, 5.0, 16)
    zeros = np.zeros(16)
    paired = Measurement(zeros, base + 0.01 + 0.001 * np.cos(np.arange(16)), base, zeros)
    assert paired.loss.value == pytest.approx(math.expm1(0.01), abs=2e-4)
    assert paired.loss.high - paired.loss.low < 0.002


@pytest.mark.parametrize(
    ("mean", "verdict"), [(0.01, "pass"), (0.05, "fail"), (0.0296, "undecided")]
)
def test_verdicts(mean, verdict):
    spread = 0.004 * np.tile([-1.0, 1.0], 8)
    decision = decide(measurement(mean + spread), Budgets(max_loss=0.03))
    assert decision.verdict == verdict
    assert "3.00%" in decision.reason
    assert (decision.more_sequences is not None) == (verdict == "undecided")


def test_the_number_of_more_sequences_is_enough():
    pattern = 0.004 * np.tile([-1.0, 1.0], 8)
    limit = math.log1p(0.03)
    decision = decide(measurement(limit - 0.001 + pattern), Budgets(max_loss=0.03))
    assert decision.verdict == "undecided"
    total = 16 + decision.more_sequences
    grown = limit - 0.001 + 0.004 * np.resize([-1.0, 1.0], total + total % 2 + 4)
    assert decide(measurement(grown), Budgets(max_loss=0.03)).verdict == "pass"


def test_both_budgets_must_be_met():
    spread = 0.001 * np.tile([-1.0, 1.0], 8)
    both = Budgets(max_loss=0.03, max_kl=0.05)
    assert decide(measurement(0.01 + spread, 0.04 + spread), both).verdict == "pass"
    assert decide(measurement(0.01 + spread, 0.06 + spread), both).verdict == "fail"
    assert decide(measurement(0.01 + spread, 0.0501 + spread), both).verdict == "undecided"
    assert decide(measurement(0.01 + spread), Budgets()).verdict == "pass"


def test_one_sequence_decides_nothing():
    decision = decide(measurement([0.0]), Budgets(max_loss=0.03))
    assert decision.verdict == "undecided"
    assert decision.more_sequences is None


@pytest.mark.parametrize("skewed", [False, True])
def test_false_accepts_at_the_budget_are_at_most_five_percent(skewed):
    generator = np.random.default_rng(5)
    limit = math.log1p(0.03)
    runs, accepted = 1500, 0
    for _ in range(runs):
        noise = generator.exponential(1.0, 24) - 1.0 if skewed else generator.normal(0, 1.0, 24)
        decision = decide(measurement(limit + 0.01 * noise), Budgets(max_loss=0.03))
        accepted += decision.verdict == "pass"
    assert accepted / runs <= 0.05


def test_growing_until_it_decides_stays_honest():
    generator = np.random.default_rng(6)
    limit = math.log1p(0.03)
    runs, accepted = 500, 0
    for _ in range(runs):
        values = limit + 0.01 * generator.normal(0, 1.0, 64)
        for look, count in enumerate((8, 16, 32, 64), start=1):
            confidence = look_confidence(look, 4)
            decision = decide(
                measurement(values[:count]), Budgets(max_loss=0.03), confidence=confidence
            )
            if decision.verdict != "undecided":
                accepted += decision.verdict == "pass"
                break
    assert accepted / runs <= 0.05
    with pytest.raises(InputError, match="between 1 and 4"):
        look_confidence(5, 4)
