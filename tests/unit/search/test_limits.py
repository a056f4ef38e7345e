"""Budgets on memory as a limit on bytes, on one device and on several."""

from __future__ import annotations

import pytest

from advisor.budgets import Budgets
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import BF16, parse_scheme
from advisor.search.limits import memory_bytes, size_limits

GB = 10**9


@pytest.fixture(scope="module")
def llama():
    return load_modelspec("meta-llama/Llama-3.1-8B")


def sized(llama, name):
    return checkpoint_size(llama, parse_scheme(name), "compressed-tensors")


def limits_of(llama, gpu, engine, budgets):
    small, large = sized(llama, "rtn-int4-g128-sym"), sized(llama, "rtn-int8-g32-sym")
    return size_limits(
        llama, small, large, [parse_scheme("rtn-int4-g128-sym"), BF16], find_profile(gpu), engine,
        budgets, context=4096, batch=1,
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["l4", "2x l4", "4x l4"])
def test_memory_of_one_device_limits_what_all_of_them_hold(llama, gpu):
    middle = sized(llama, "rtn-int4-g32-asym")
    needed = memory_bytes(llama, middle, find_profile(gpu), "vllm", context=4096, batch=1)
    (found,) = limits_of(llama, gpu, "vllm", Budgets(max_memory_bytes=needed))
    assert (found.budget, found.given, found.assumed) == ("max_memory", needed, False)
    assert found.max_bytes == pytest.approx(middle.total_bytes, rel=1e-4)
    large = sized(llama, "rtn-int8-gch-sym")
    there = memory_bytes(llama, large, find_profile(gpu), "vllm", context=4096, batch=1)
    assert found.needed(large.total_bytes) == pytest.approx(there, rel=1e-4)


def test_two_cards_hold_less_than_twice_what_one_holds_beside_its_overhead(llama):
    (one,), (two,) = (limits_of(llama, gpu, "vllm", Budgets()) for gpu in ("l4", "2x l4"))
    assert one.max_bytes < two.max_bytes < 2 * 0.92 * find_profile("l4").memory_bytes
    assert one.assumed


def test_a_budget_on_memory_can_be_no_more_than_the_device_has(llama):
    there = find_profile("l4").memory_bytes
    (given,) = limits_of(llama, "l4", "vllm", Budgets(max_memory_bytes=100 * GB))
    (whole,) = limits_of(llama, "l4", "vllm", Budgets(max_memory_bytes=there))
    assert given.max_bytes == whole.max_bytes
    assert given.most == there


def test_what_is_decompressed_anyway_is_not_limited_by_memory(llama):
    assert limits_of(llama, "l4", "transformers", Budgets()) == ()
    (tight,) = limits_of(llama, "l4", "transformers", Budgets(max_memory_bytes=8 * GB))
    assert (tight.max_bytes, tight.budget) == (1, "max_memory")
    assert tight.needed(6 * GB) > 16 * GB


def test_every_budget_says_what_it_would_have_to_be_the_tightest_first(llama):
    budgets = Budgets(max_size_bytes=5 * GB, max_memory_bytes=9 * GB, min_tokens_per_s=40.0)
    found = limits_of(llama, "l4", "vllm", budgets)
    assert [limit.max_bytes for limit in found] == sorted(limit.max_bytes for limit in found)
    assert {limit.budget for limit in found} == {"max_size", "max_memory", "min_speed"}
    for limit in found:
        edge = limit.needed(limit.max_bytes)
        assert edge == pytest.approx(limit.given, rel=1e-3)
        more = limit.needed(2 * limit.max_bytes)
        assert more < edge if limit.budget == "min_speed" else more > edge
