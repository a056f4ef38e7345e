"""Budgets on memory as a limit on bytes, on one device and on several."""

from __future__ import annotations

import pytest

from advisor.budgets import Budgets
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import BF16, parse_scheme
from advisor.search.limits import memory_bytes, size_limit

GB = 10**9


@pytest.fixture(scope="module")
def llama():
    return load_modelspec("meta-llama/Llama-3.1-8B")


def sized(llama, name):
    return checkpoint_size(llama, parse_scheme(name), "compressed-tensors")


def limit_of(llama, gpu, engine, budgets):
    small, large = sized(llama, "rtn-int4-g128-sym"), sized(llama, "rtn-int8-g32-sym")
    return size_limit(
        llama, small, large, [parse_scheme("rtn-int4-g128-sym"), BF16], find_profile(gpu), engine,
        budgets, context=4096, batch=1,
    )  # fmt: skip


@pytest.mark.parametrize("gpu", ["l4", "2x l4", "4x l4"])
def test_memory_of_one_device_limits_what_all_of_them_hold(llama, gpu):
    middle = sized(llama, "rtn-int4-g32-asym")
    needed = memory_bytes(llama, middle, find_profile(gpu), "vllm", context=4096, batch=1)
    found = limit_of(llama, gpu, "vllm", Budgets(max_memory_bytes=needed))
    assert found.budget == "max_memory"
    assert found.max_bytes == pytest.approx(middle.total_bytes, rel=1e-4)


def test_two_cards_hold_less_than_twice_what_one_holds_beside_its_overhead(llama):
    one, two = (limit_of(llama, gpu, "vllm", Budgets()).max_bytes for gpu in ("l4", "2x l4"))
    assert one < two < 2 * 0.92 * find_profile("l4").memory_bytes


def test_what_is_decompressed_anyway_is_not_limited_by_memory(llama):
    assert limit_of(llama, "l4", "transformers", Budgets()).max_bytes is None
    tight = limit_of(llama, "l4", "transformers", Budgets(max_memory_bytes=8 * GB))
    assert (tight.max_bytes, tight.budget) == (1, "max_memory")
