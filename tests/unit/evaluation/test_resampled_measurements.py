"""False accepts on real measurements: 302 sequences of the small trained model, eight candidates.

The mean over all sequences is the truth. Candidates are moved to the budget exactly, the hardest
case, sequences are drawn anew for every run, and the gate grows its text until it decides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from advisor.budgets import Budgets
from advisor.evaluation.gate import decide, holm, look_confidence
from advisor.evaluation.intervals import guarded_interval, t_quantile
from advisor.evaluation.measure import Measurement

DATA = json.loads(
    (Path(__file__).parents[2] / "golden" / "measured_sequences.json").read_text(encoding="utf-8")
)["candidates"]
NAMES = tuple(DATA)
LOOKS = (32, 64, 128)
RUNS = 500
KL, LOSS = (np.array([DATA[name][kind] for name in NAMES]) for kind in ("kl", "difference"))
LIMIT = 0.02
KINDS = pytest.mark.parametrize("kind", ["kl", "loss"])


def _at_budget(kind):
    """Every row's mean becomes the limit; differences may be negative and are shifted."""
    values = KL if kind == "kl" else LOSS
    means = values.mean(1, keepdims=True)
    return values * LIMIT / means if kind == "kl" else values - means + LIMIT


def _draws(values, seed, runs=RUNS):
    """Return sequences drawn anew, the same for all candidates: [runs, candidates, sequences]."""
    places = np.random.default_rng(seed).integers(0, values.shape[1], (runs, LOOKS[-1]))
    return values[:, places].transpose(1, 0, 2)


def _interval(values, confidence):
    """The gate's interval along the last axis, for many at once."""
    count, mean = values.shape[-1], values.mean(-1)
    spread = values.std(-1)
    skew = (((values - mean[..., None]) / spread[..., None]) ** 3).mean(-1)
    quantile = t_quantile(0.5 + confidence / 2, count - 1)
    error = values.std(-1, ddof=1) / math.sqrt(count)

    def inverse(y):
        inside = 1 + skew * (y / math.sqrt(count) - skew / (6 * count))
        return 3 * math.sqrt(count) / skew * (np.cbrt(inside) - 1)

    low = np.minimum(mean - quantile * error, mean - error * inverse(quantile))
    return low, np.maximum(mean + quantile * error, mean - error * inverse(-quantile))


def _accepted(draws, share=1.0):
    """Return what a text that doubles until it decides accepts, [runs, candidates]."""
    decided = np.zeros(draws.shape[:2], dtype=int)
    for look, count in enumerate(LOOKS, start=1):
        confidence = 1 - (1 - look_confidence(look, len(LOOKS))) * share
        low, high = _interval(draws[:, :, :count], confidence)
        is_open = decided == 0
        decided[is_open & (high <= LIMIT)] = 1
        decided[is_open & (low > LIMIT)] = -1
    return decided == 1


def test_the_measurements_are_what_a_search_sees():
    assert KL.shape == LOSS.shape == (8, 302)
    assert np.corrcoef(KL)[4:, 4:].min() > 0.5, "neighbours stumble over the same sequences"
    deviations = KL - KL.mean(1, keepdims=True)
    assert ((deviations**3).mean(1) / KL.std(1) ** 3).max() > 1, "with a long upper tail"


@KINDS
def test_many_at_once_decide_as_the_gate_does(kind):
    draws = _draws(_at_budget(kind), 1, runs=4)[:, :, :32]
    low, high = _interval(draws, 0.98)
    for run in range(4):
        for place in range(8):
            one = guarded_interval(draws[run, place], 0.98)
            assert low[run, place] == pytest.approx(one.low, rel=1e-9)
            assert high[run, place] == pytest.approx(one.high, rel=1e-9)


@KINDS
def test_a_candidate_at_its_budget_is_accepted_in_at_most_five_percent(kind):
    rate = _accepted(_draws(_at_budget(kind), 7)).mean()
    assert 0.005 < rate <= 0.05


def test_slices_are_gated_as_strictly():
    """The main text is well within; one slice lies exactly at the budget."""
    values = _at_budget("kl")
    main, code, prose = (_draws(values, seed) for seed in (8, 9, 10))
    accepted = _accepted(code) & _accepted(0.6 * main) & _accepted(0.6 * prose)
    assert 0.005 < accepted.mean() <= 0.05
    pieces = [
        Measurement(v, v, np.zeros_like(v), np.ones_like(v))
        for v in (0.5 * main[0, 0], LIMIT * np.linspace(1.1, 1.3, 32))
    ]
    found = decide(pieces[0], Budgets(max_kl=LIMIT), slices={"code": pieces[1]})
    assert found.verdict == "fail", "whatever the main text says"


@KINDS
def test_a_search_over_many_candidates_answers_wrongly_in_at_most_five_percent(kind):
    """All eight lie at the budget, so that any answer is wrong; uncorrected, far too many are.

    Holm's procedure accepts anything only if its first step does, at an eighth of the error.
    """
    draws = _draws(_at_budget(kind), 11)
    corrected = _accepted(draws, 1 / 8).any(1).mean()
    assert corrected <= 0.05
    assert _accepted(draws).any(1).mean() > max(0.05, corrected), "each at 5% is not enough"


def test_a_search_where_some_pass_still_finds_them():
    """Truths as measured, the budget between them: what surely passes costs the others nothing."""
    scaled = KL * LIMIT / (1.25 * KL[NAMES.index("mixed-0.3")].mean())
    good = scaled.mean(1) < 0.85 * LIMIT
    assert good.sum() >= 4
    assert (scaled.mean(1) > LIMIT).sum() >= 2
    draws = _draws(scaled, 12, runs=10)
    for run in draws:
        known = {1 / n: _accepted(run[None], 1 / n)[0] for n in range(1, 9)}
        tests = [lambda share, i=i, known=known: bool(known[share][i]) for i in range(8)]
        accepted = [test(share) for test, share in zip(tests, holm(tests), strict=True)]
        assert accepted == good.tolist()


def test_holm_by_hand():
    def at(p_value):
        return lambda share: p_value <= 0.05 * share

    # 0.001 <= .05/4, 0.016 <= .05/3, 0.03 > .05/2: the last two are left at a half.
    shares = holm([at(0.03), at(0.001), at(0.2), at(0.016)])
    assert shares == [1 / 2, 1 / 4, 1 / 2, 1 / 3]
    assert holm([at(0.02)]) == [1.0]
    assert holm([]) == []
    assert holm([at(0.03), at(0.03)]) == [1 / 2, 1 / 2], "neither is accepted"
