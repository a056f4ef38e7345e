"""What a search chooses from where the engine mixes nothing, or no kernel takes what it mixes."""

from __future__ import annotations

import pytest

from advisor.engines.options import MixtureOptions, mixture_options
from advisor.errors import InputError
from advisor.formats.loaders import loading_problems
from advisor.hardware.catalogue import find_profile
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search import sole_options
from advisor.search.offers import uniform_offers
from advisor.search.sole_options import search_options


@pytest.fixture(scope="module")
def spec():
    return load_modelspec("llama-3.1-8b")


@pytest.mark.parametrize(
    ("gpu", "scheme"),
    [("h100-sxm", "rtn-fp8-gch-afp8"), ("h200-sxm", "rtn-fp8-gch-afp8"),
     ("b200", "rtn-fp8-b128-afp8")],
)  # fmt: skip
def test_an_engine_that_mixes_nothing_gets_the_one_scheme_that_it_runs(spec, gpu, scheme):
    hardware = find_profile(gpu)
    found = search_options("tensorrt-llm", hardware, spec, spec.linears)
    assert found.format == "compressed-tensors"
    assert [str(option) for option in found.schemes] == [scheme, "bf16"]
    offers = uniform_offers(spec, spec.linears, hardware, "tensorrt-llm", found)
    assert scheme in {offer.name for offer in offers}
    # Its loader takes no calibrated scales per channel, and NVFP4 by other names.
    assert not any("static" in offer.name or "nvfp4" in offer.name for offer in offers)


@pytest.mark.parametrize("gpu", ["l4", "a100-sxm-80", "t4"])
def test_an_engine_that_reads_nothing_of_ours_says_what_does(spec, gpu):
    with pytest.raises(InputError) as caught:
        search_options("tensorrt-llm", find_profile(gpu), spec, spec.linears)
    assert "Use --engine vllm" in str(caught.value)
    assert "`advisor recommend --engine tensorrt-llm` says what would suit it" in str(caught.value)


def test_where_no_kernel_takes_what_is_mixed_something_uniform_is_offered(monkeypatch, spec):
    """As on a release whose integer kernels do not take the model's shapes."""
    hardware = find_profile("h100-sxm")
    whole = mixture_options("vllm", hardware, spec.linears)
    reason = "marlin needs in_features % 128 == 0, but it is 96"
    nothing = MixtureOptions(
        whole.format, (parse_scheme("bf16"),), {},
        tuple((scheme, reason) for scheme in whole.schemes if scheme.is_quantized),
    )  # fmt: skip
    monkeypatch.setattr(sole_options, "mixture_options", lambda *_: nothing)
    found = search_options("vllm", hardware, spec, spec.linears)
    assert len(found.schemes) == 2
    assert found.schemes[0].activation in ("fp8", "int8") or found.schemes[0].bits == 8
    assert found.ruled_out == nothing.ruled_out
    monkeypatch.setattr(sole_options, "_carried", lambda *_: None)
    with pytest.raises(InputError, match=r"offers no scheme.*marlin needs in_features.*recommend"):
        search_options("vllm", hardware, spec, spec.linears)


def test_what_is_mixed_is_left_alone(spec):
    hardware = find_profile("l4")
    found = search_options("vllm", hardware, spec, spec.linears)
    assert found == mixture_options("vllm", hardware, spec.linears)


def test_tensorrt_llm_reads_one_scheme_per_checkpoint(spec):
    schemes = {m.name: parse_scheme("rtn-fp8-gch-afp8") for m in spec.linears}
    assert loading_problems("tensorrt-llm", "compressed-tensors", schemes, spec.linears)[0] == []
    some = [m.name for m in spec.linears if m.name.endswith("down_proj")]
    mixed = schemes | dict.fromkeys(some, parse_scheme("rtn-fp8-b128-afp8"))
    (refusal,), _ = loading_problems("tensorrt-llm", "compressed-tensors", mixed, spec.linears)
    assert "more than one config group, but got rtn-fp8-b128-afp8, rtn-fp8-gch-afp8" in refusal
    kept = {name: scheme for name, scheme in schemes.items() if name not in some}
    assert loading_problems("tensorrt-llm", "compressed-tensors", kept, spec.linears)[0] == []
