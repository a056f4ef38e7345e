"""Time as a limit: which options are there, and the best assignment that is fast enough."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from advisor.budgets import Budgets
from advisor.engines.options import mixture_options
from advisor.engines.verdict import verdict
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.predict.speed import predict_speed
from advisor.schemes import BF16, parse_scheme
from advisor.search.allocation import Option, allocate, allocate_for_score
from advisor.search.finalists import excess_bytes
from advisor.search.goal import Goal
from advisor.search.limits import size_limits
from advisor.search.pace import Pace, in_time, is_fast, solve_in_time

SPEC = load_modelspec("meta-llama/Llama-3.1-8B")


def task_of(gpu, batch, **budgets):
    hardware = find_profile(gpu)
    offered = mixture_options("vllm", hardware, SPEC.linears)
    return SimpleNamespace(
        spec=SPEC, hardware=hardware, engine="vllm", budgets=Budgets(**budgets), context=64,
        batch=batch,
    ), offered  # fmt: skip


def uniform_speed(task, name):
    scheme = parse_scheme(name)
    size = checkpoint_size(SPEC, {m.name: scheme for m in SPEC.linears}, "compressed-tensors")
    kernel = verdict("vllm", scheme, task.hardware, SPEC.linears)
    found = predict_speed(
        SPEC, scheme, kernel, task.hardware, "vllm", linear_bytes=size.quantizable_bytes,
        context=task.context, batch=task.batch,
    )  # fmt: skip
    return found.decode.expected


def instance(seed, groups=5, options=4):
    generator = np.random.default_rng(seed)
    found = {
        f"group{g}": [
            Option(f"option{o}", float(generator.integers(1, 50)), float(generator.uniform(0, 1)))
            for o in range(options)
        ]
        for g in range(groups)
    }
    seconds = {
        key: {option.name: float(generator.uniform(0.1, 1)) for option in own}
        for key, own in found.items()
    }
    return found, seconds


def every(groups, seconds):
    for chosen in itertools.product(*groups.values()):
        time = sum(seconds[key][o.name] for key, o in zip(groups, chosen, strict=True))
        yield sum(o.cost for o in chosen), sum(o.score for o in chosen), time


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("objective", ["score", "cost"])
def test_what_is_found_in_time_is_on_the_hull_of_all_assignments(seed, objective):
    groups, seconds = instance(seed)
    points = list(every(groups, seconds))
    other = 0 if objective == "score" else 1
    own = 1 - other
    limit = float(np.quantile([p[other] for p in points], 0.5))
    within = [p for p in points if p[other] <= limit + 1e-9]
    most = float(np.quantile([p[2] for p in within], 0.3))
    solve = partial(allocate if objective == "score" else allocate_for_score, limit=limit)
    found = solve_in_time(solve, groups, seconds, most, objective)
    time = sum(seconds[key][name] for key, name in found.choice.items())
    value = getattr(found, objective)
    chosen = [next(o for o in own if o.name == found.choice[k]) for k, own in groups.items()]
    assert value == pytest.approx(sum(getattr(o, objective) for o in chosen))
    assert time <= most
    assert (found.cost, found.score)[other] <= limit + 1e-9
    best = min(p[own] for p in within if p[2] <= most)
    assert value >= best - 1e-9
    # At some price of time nothing within the limit is better: that is what the hull is.
    prices = np.concatenate(([0.0], np.logspace(-3, 3, 4000)))
    others = np.array([[p[own], p[2]] for p in within])
    gaps = [value + price * time - (others @ [1.0, price]).min() for price in prices]
    assert min(gaps) < 0.02 * max(1.0, value)


def test_without_a_fast_one_the_fastest_is_returned():
    groups, seconds = instance(3)
    found = solve_in_time(partial(allocate, limit=1e9), groups, seconds, 0.0, "score")
    time = sum(seconds[key][name] for key, name in found.choice.items())
    assert time == pytest.approx(min(time for _, _, time in every(groups, seconds)))


def test_a_limit_that_nothing_exceeds_changes_nothing():
    groups, seconds = instance(4)
    solve = partial(allocate, limit=100.0)
    assert solve_in_time(solve, groups, seconds, 1e9, "score") == solve(groups)


@pytest.mark.parametrize("gpu", ["rtx-4090", "h100-sxm", "b200"])
def test_where_bytes_alone_count_inputs_are_not_rounded(gpu):
    task, offered = task_of(gpu, 1, max_size_bytes=6 * 10**9)
    kept, pace = in_time(task, offered, "balanced")
    assert pace is None
    assert any(s.activation for s in offered.schemes)
    assert not [s for s in kept.schemes if s.activation]
    assert {s for s in offered.schemes if not s.activation} == set(kept.schemes)


def test_what_only_rounds_its_inputs_stays_an_option():
    """vLLM on CPUs has no 8-bit weights under 16-bit inputs, SGLang on ROCm nothing else."""
    hardware = find_profile("rtx-4090")
    offered = mixture_options("vllm", hardware, SPEC.linears)
    few = tuple(s for s in offered.schemes if s.bits == 4 or s.activation or s == BF16)
    task, _ = task_of("rtx-4090", 1)
    kept, _ = in_time(task, replace(offered, schemes=few), "balanced")
    names = {str(s) for s in kept.schemes}
    assert {"rtn-fp8-gch-afp8", "rtn-int8-gch-sym-aint8"} <= names


def test_speed_is_preferred_where_arithmetic_decides():
    for gpu, batch, quick in (
        ("b200", 1, True), ("rtx-5090", 1, True), ("h100-sxm", 2048, True), ("h100-sxm", 1, False),
        ("rtx-4090", 1, False),
    ):  # fmt: skip
        task, offered = task_of(gpu, batch)
        kept, pace = in_time(task, offered, "speed")
        assert pace is None
        rounding = [s for s in kept.schemes if s.activation]
        assert bool(rounding) == quick, (gpu, batch)
        if quick:
            assert set(kept.schemes) == {*rounding, BF16}
    # Without rounded inputs of four bits nothing is left out.
    task, offered = task_of("b200", 1)
    few = replace(offered, schemes=tuple(s for s in offered.schemes if s.activation is None))
    assert in_time(task, few, "speed") == (few, None)
    # FP8 alone is too large for five gigabytes: weight-only schemes stay.
    task, offered = task_of("h100-sxm", 2048, max_size_bytes=5 * 10**9)
    assert not [s for s in in_time(task, offered, "speed")[0].schemes if s.activation]


def test_a_speed_budget_that_16_bit_products_miss_is_a_limit_on_time():
    batch = 1024
    plain, _ = task_of("b200", batch)
    slow, fast = (uniform_speed(plain, name) for name in ("gptq-int4-g128-sym", "nvfp4-anvfp4"))
    assert slow < fast
    task, offered = task_of("b200", batch, min_tokens_per_s=(slow + fast) / 2)
    kept, pace = in_time(task, offered, "balanced")
    assert pace is not None
    assert kept == offered
    names = [linear.name for linear in SPEC.linears]
    all_slow, all_fast = (
        dict.fromkeys(names, parse_scheme(name)) for name in ("gptq-int4-g128-sym", "nvfp4-anvfp4")
    )
    assert not pace.keeps(all_slow)
    assert pace.keeps(all_fast)
    half = all_fast | {name: all_slow[name] for name in names[: len(names) // 2]}
    assert pace.of(all_fast) < pace.of(half) < pace.of(all_slow)
    assert pace.of(half) == pytest.approx((pace.of(all_fast) + pace.of(all_slow)) / 2, rel=0.02)

    smallest = checkpoint_size(SPEC, all_fast, "compressed-tensors")
    largest = checkpoint_size(SPEC, {}, "compressed-tensors")
    limits = size_limits(
        SPEC, smallest, largest, kept.schemes, task.hardware, "vllm", task.budgets, context=64,
        batch=batch,
    )  # fmt: skip
    (speed,) = [limit for limit in limits if limit.budget == "min_speed"]
    assert speed.max_bytes >= smallest.total_bytes, "a checkpoint of NVFP4 is fast enough"


def test_where_nothing_is_fast_enough_the_fastest_is_looked_for():
    task, offered = task_of("b200", 1024, min_tokens_per_s=1e9)
    _, pace = in_time(task, offered, "balanced")
    names = [linear.name for linear in SPEC.linears]
    assert pace.keeps(dict.fromkeys(names, parse_scheme("nvfp4-anvfp4")))
    assert not pace.keeps(dict.fromkeys(names, parse_scheme("rtn-fp8-gch-afp8")))
    # Reading weights is what takes the time on this one: no type of inputs helps.
    assert in_time(*task_of("rtx-4090", 1, min_tokens_per_s=1e9), "balanced")[1] is None


def test_no_limit_on_time_where_all_options_keep_the_budget():
    task, offered = task_of("b200", 1, min_tokens_per_s=1.0)
    kept, pace = in_time(task, offered, "balanced")
    assert pace is None
    assert not [s for s in kept.schemes if s.activation]


@pytest.mark.parametrize(
    ("gpu", "batch", "prefer", "fast", "slow"),
    [
        # Bytes decide: whatever is small enough is fast.
        ("rtx-4090", 1, "speed", ["gptq-int4-g128-sym", "rtn-fp8-gch-afp8"], []),
        # Arithmetic decides, and nothing was said of speed.
        ("h100-sxm", 2048, "balanced", ["gptq-int4-g128-sym", "rtn-fp8-gch-afp8"], []),
        ("h100-sxm", 2048, "speed", ["rtn-fp8-gch-afp8"], ["gptq-int4-g128-sym", "rtn-fp8-gch"]),
        # Ampere multiplies in INT8; FP8 checkpoints run there with their inputs in 16 bits.
        (
            "a100-sxm-80", 2048, "speed", ["smoothquant-int8-gch-sym-aint8"],
            ["rtn-fp8-gch-afp8", "awq-int4-g128-asym"],
        ),
    ],
)  # fmt: skip
def test_what_counts_as_fast_beside_the_mixtures(gpu, batch, prefer, fast, slow):
    task, offered = task_of(gpu, batch)
    kept, pace = in_time(task, offered, prefer)

    def whole(name):
        assignment = {linear.name: parse_scheme(name) for linear in SPEC.linears}
        return is_fast(task, kept, pace, assignment, None)

    assert [name for name in (*fast, *slow) if whole(name)] == fast


def test_a_candidate_from_elsewhere_keeps_the_limit_on_time():
    task, offered = task_of("b200", 1024, min_tokens_per_s=1e9)
    kept, pace = in_time(task, offered, "balanced")
    names = [linear.name for linear in SPEC.linears]
    quick, slow = (parse_scheme(name) for name in ("nvfp4-anvfp4", "gptq-int4-g128-sym"))
    assert is_fast(task, kept, pace, dict.fromkeys(names, quick), None)
    assert not is_fast(task, kept, pace, dict.fromkeys(names, slow), "gptq")
    assert not is_fast(task, kept, pace, dict.fromkeys(names, quick) | {names[0]: slow}, None)


def test_a_candidate_that_is_too_slow_is_over_the_budget():
    slow, fast = parse_scheme("gptq-int4-g64-sym"), parse_scheme("nvfp4-anvfp4")
    pace = Pace({slow: 2.0, fast: 1.0}, {"a": 0.5, "b": 0.5}, 1.6)
    goal = Goal(None, None, None, smallest=False, pace=pace)
    mixture = SimpleNamespace(size_bytes=1000, assignment={"a": slow, "b": fast, "lm_head": slow})
    assert pace.of(mixture.assignment) == 1.5
    assert excess_bytes(mixture, goal) == 0
    mixture.assignment["b"] = replace(slow, method="rtn")
    assert excess_bytes(mixture, goal) == 250
