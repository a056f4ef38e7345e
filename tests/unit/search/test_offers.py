"""Which uniform candidates without scores are measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from advisor.engines.options import mixture_options
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search.families import Family
from advisor.search.mixture import Mixture
from advisor.search.offers import beaten_already, uniform_offers, worth_measuring


def offer(name: str, loss: float, size: int = 100) -> Mixture:
    scheme = parse_scheme(name)
    return Mixture(
        name, Family(scheme.method), {"a": scheme}, size, 8.0, 0.0, "compressed-tensors",
        published_loss=loss,
    )  # fmt: skip


OFFERS = [
    offer("gptq-int8-gch-sym-aint8", 0.0010),
    offer("smoothquant-int8-gch-sym-aint8", 0.0011),
    offer("smoothquant-int8-gch-sym-aint8-static", 0.0011),
    offer("rtn-int8-gch-sym-aint8", 0.0012),
    offer("gptq-fp8-gch-afp8", 0.0014),
    offer("rtn-fp8-gch-afp8", 0.0015),
    offer("rtn-fp8-gtensor-afp8-static", 0.0015),
    offer("bnb-nf4", 0.0030, size=60),
    offer("nvfp4-anvfp4", 0.0400, size=60),
]


def test_the_leader_of_every_family_that_competes_is_measured():
    names = [mixture.name for mixture in worth_measuring(OFFERS, 1000, 4)]
    assert names == [
        "gptq-int8-gch-sym-aint8", "gptq-fp8-gch-afp8", "bnb-nf4",
        "smoothquant-int8-gch-sym-aint8-static", "rtn-fp8-gtensor-afp8-static",
    ]  # fmt: skip
    # NVFP4 has forty times the least loss: out of it. With room to spare it is measured after all.
    assert len(worth_measuring(OFFERS, 1000, 9)) == 9
    assert "nvfp4-anvfp4" in [m.name for m in worth_measuring(OFFERS, 1000, 9)]


def test_others_fill_up_where_few_families_compete():
    few = [offer("gptq-int8-gch-sym-aint8", 0.001), offer("smoothquant-int8-gch-sym-aint8", 0.002),
           offer("rtn-int8-gch-sym-aint8", 0.3)]  # fmt: skip
    assert [m.name for m in worth_measuring(few, 1000, 2)] == [few[0].name, few[1].name]
    assert [m.name for m in worth_measuring(few, 1000, 4)] == [m.name for m in few]


def test_only_what_fits_competes():
    assert [m.name for m in worth_measuring(OFFERS, 70, 1)] == ["bnb-nf4"]
    assert worth_measuring(OFFERS, 10, 4) == []


@pytest.mark.parametrize(
    ("per_token", "best", "beaten"),
    [(0.014, 0.01, False), (0.016, 0.01, True), (None, 0.01, False)],
)
def test_calibrated_scales_follow_their_siblings(per_token, best, beaten):
    static = offer("smoothquant-int8-gch-sym-aint8-static", 0.001)
    known = [SimpleNamespace(mixture=offer("rtn-fp8-gch-afp8", 0.001), measured_kl=best)]
    if per_token is not None:
        sibling = offer("gptq-int8-gch-sym-aint8", 0.001)
        known.append(SimpleNamespace(mixture=sibling, measured_kl=per_token))
    assert beaten_already(static, known) == beaten
    assert not beaten_already(offer("gptq-int8-gch-sym-aint8", 0.001), known)


@pytest.mark.parametrize(("gpu", "offered"), [("rtx4090", False), ("b200", True)])
def test_inputs_that_stay_in_16_bits_are_no_candidate_of_their_own(
    gpu, offered, random_llama, random_llama_folder
):
    spec, hardware = load_modelspec(str(random_llama_folder)), find_profile(gpu)
    mixed = mixture_options("vllm", hardware, random_llama.linears)
    found = {m.name for m in uniform_offers(spec, random_llama.linears, hardware, "vllm", mixed)}
    assert "nvfp4" in found
    assert ("nvfp4-anvfp4" in found) == offered
