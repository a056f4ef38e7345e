"""What a library is asked for in a search: only what the engine loads and runs, at its size."""

from __future__ import annotations

import random

import pytest

from advisor.backends.mixtures import average_bits
from advisor.backends.registry import get_backend
from advisor.hardware.catalogue import find_profile
from advisor.modelspec import LinearSpec
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme
from advisor.search.outside import Wanted
from advisor.workflows.backend_choices import (
    Server,
    best_mixture,
    best_uniform,
    possible_schemes,
    worth_making,
)


@pytest.fixture
def server(llama_builder):
    folder = llama_builder(hidden_size=256, intermediate_size=512)
    return lambda engine="vllm": Server(load_modelspec(folder), find_profile("rtx-4090"), engine)


def size_of(server: Server, name: str) -> int:
    return checkpoint_size(server.spec, parse_scheme(name), "gptq").total_bytes


def mixture(server: Server, name: str, max_bytes: int | None):
    backend = get_backend(name)
    return best_mixture(backend, possible_schemes(backend, server), server, max_bytes)


def test_what_no_loader_of_the_engine_takes_is_not_made(server):
    """vLLM's kernels run asymmetric integers, and its reader of gptq files refuses them."""
    backend = get_backend("gptqmodel")
    vllm = possible_schemes(backend, server("vllm"))
    assert {scheme.symmetric for scheme, _ in vllm} == {True}
    assert {scheme.weight for scheme, _ in vllm} == {"int4", "int8"}
    transformers = possible_schemes(backend, server("transformers"))
    assert {scheme.symmetric for scheme, _ in transformers} == {True, False}
    limit = size_of(server(), "autoround-int4-g64-sym")
    assert str(best_uniform(vllm, server("vllm"), limit)) == "gptq-int4-g64-sym"


def test_a_mixture_is_asked_for_with_the_bits_that_the_size_allows(server):
    vllm = server()
    limit = size_of(vllm, "autoround-int4-g32-sym") + 20_000
    scheme, settings = mixture(vllm, "auto-round", limit)
    assert str(scheme) == "autoround-int4-g32-sym"
    assert settings["options"] == "int4-g128-sym,int8-g128-sym"
    weights = sum(linear.parameters for linear in vllm.spec.linears)
    assert settings["target_bits"] == pytest.approx(4.625 + 20_000 * 8 / weights, abs=0.01)


def test_whatever_is_chosen_at_that_average_fits(server):
    vllm = server()
    limit = size_of(vllm, "autoround-int4-g32-sym") + 20_000
    _, settings = mixture(vllm, "auto-round", limit)
    options = [parse_scheme(f"autoround-int{part}-sym") for part in ("4-g32", "4-g128", "8-g128")]
    draw = random.Random(0)
    nearest = 0.0
    for _ in range(200):
        chosen: dict[LinearSpec, str] = {one: draw.choice(options) for one in vllm.spec.linears}
        bits = sum(average_bits(s, [one]) * one.parameters for one, s in chosen.items())
        average = bits / sum(one.parameters for one in chosen)
        if average <= settings["target_bits"]:
            nearest = max(nearest, average)
            assignment = {one.name: scheme for one, scheme in chosen.items()}
            assert checkpoint_size(vllm.spec, assignment, "gptq").total_bytes <= limit
    assert nearest > settings["target_bits"] - 0.2


@pytest.mark.parametrize(
    ("engine", "name", "scheme", "more"),
    [
        ("transformers", "auto-round", "int4-g32", 20_000),  # reads one setting for all modules
        ("vllm", "gptqmodel", "int4-g32", 20_000),  # mixes nothing itself
        ("vllm", "auto-round", "int4-g128", 0),  # nothing is left to spend
        ("vllm", "auto-round", "int8-g128", 10**6),  # the best of all options fits everywhere
        ("vllm", "auto-round", "int4-g32", None),
    ],
)
def test_where_there_is_nothing_to_mix_none_is_asked_for(server, engine, name, scheme, more):
    limit = None if more is None else size_of(server(), f"autoround-{scheme}-sym") + more
    assert mixture(server(engine), name, limit) is None


def rounds_its_inputs(assignment, carried):
    assert carried in ("gptq", "compressed-tensors")
    return all(scheme.activation for scheme in assignment.values())


def test_what_is_not_as_fast_as_was_asked_for_is_not_made(server):
    vllm = server()
    limit = size_of(vllm, "autoround-int4-g32-sym") + 20_000
    quick, any_speed = Wanted(10**9, rounds_its_inputs), Wanted(limit, lambda *_: True)
    found, why_not = worth_making(get_backend("llmcompressor"), vllm, quick)
    assert [str(scheme) for scheme, _ in found] == ["rtn-fp8-gch-afp8"]
    assert why_not == ""
    # All that AutoRound makes multiplies in 16 bits: neither its uniform one nor its mixture.
    assert len(worth_making(get_backend("auto-round"), vllm, any_speed)[0]) == 2
    found, why_not = worth_making(get_backend("auto-round"), vllm, Wanted(limit, rounds_its_inputs))
    assert found == []
    assert why_not == (
        f"nothing that it makes has a kernel in vllm and fits {limit:,} bytes, and is as fast as "
        "was asked for"
    )


def test_where_nothing_fits_speed_is_not_blamed(server):
    found, why_not = worth_making(get_backend("gptqmodel"), server(), Wanted(1000, lambda *_: True))
    assert found == []
    assert why_not == "nothing that it makes has a kernel in vllm and fits 1,000 bytes"
