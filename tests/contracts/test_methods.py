"""Every method of the registry, through the same checks."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.methods import registry
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

SETTINGS = QuantizationSettings()
SCHEMES = {
    "rtn": (
        "rtn-int4-g64-sym",
        "rtn-int3-g32-asym",
        "rtn-int8-gch-sym-aint8",
        "rtn-fp8-gch",
        "rtn-fp8-gtensor-afp8-static",
        "rtn-int4-g64-sym-afp8",
    ),
    "gptq": (
        "gptq-int4-g64-sym",
        "gptq-int3-g32-asym",
        "gptq-int4-g64-sym-actorder",
        "gptq-fp8-gch",
        "gptq-fp8-b32-afp8",
        "gptq-fp8-gch-afp8-static",
        "gptq-int4-g64-sym-afp8",
    ),
    "awq": ("awq-int4-g64-asym", "awq-int4-gch-sym"),
    "smoothquant": (
        "smoothquant-int8-gch-sym-aint8",
        "smoothquant-fp8-gch-afp8",
        "smoothquant-int8-gch-sym-aint8-static",
    ),
    "hqq": ("hqq-int4-g64-asym", "hqq-int3-g32-asym", "hqq-int8-g64-asym"),
    "bnb": ("bnb-nf4", "bnb-fp4-dq"),
    "llm.int8": ("llm.int8",),
    "gguf": ("gguf-q4_0", "gguf-q4_1", "gguf-iq4_nl", "gguf-q8_0"),
    "mxfp4": ("mxfp4", "mxfp4-amxfp4"),
    "mxfp8": ("mxfp8", "mxfp8-amxfp8"),
    "nvfp4": ("nvfp4", "nvfp4-anvfp4"),
}
CASES = [name for names in SCHEMES.values() for name in names]


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(300, 192, generator=generator)
    statistics = LayerStatistics(
        tokens=300,
        second_moment=inputs.t() @ inputs,
        absolute_maximum=inputs.abs().amax(0),
        absolute_sum=inputs.abs().sum(0),
    )
    weight = 0.05 * torch.randn(48, 192, generator=generator)
    return weight.to(torch.bfloat16).to(torch.float32), statistics


def test_every_method_has_cases():
    assert set(SCHEMES) == set(registry.method_names())


@pytest.mark.parametrize("name", CASES)
def test_result_has_the_promised_shape_and_types(problem, name):
    weight, statistics = problem
    scheme = parse_scheme(name)
    found = registry.quantize(weight, statistics, scheme, SETTINGS)
    assert found.scheme == scheme
    assert found.shape == weight.shape
    assert found.codes.dtype == torch.uint8
    assert found.codes.is_contiguous()
    assert found.scales.dtype == torch.float32
    # GGUF's scales may be negative: the largest weight takes the grid's longer end.
    assert bool((found.scales > 0).all()) or scheme.method == "gguf"
    assert found.scales.shape[0] in (1, 2, 48)
    if scheme.is_integer:
        assert int(found.codes.max()) < 2 ** int(scheme.bits)
    assert (found.zero_points is not None) == (scheme.symmetric is False)
    relative = (found.dequantize() - weight).norm() / weight.norm()
    assert relative < {3: 0.35, 4: 0.2, 8: 0.04}[int(scheme.bits)]


@pytest.mark.parametrize("name", CASES)
def test_same_codes_again_and_inputs_untouched(problem, name):
    weight, statistics = problem
    kept = weight.clone(), statistics.second_moment.clone()
    scheme = parse_scheme(name)
    first = registry.quantize(weight, statistics, scheme, SETTINGS)
    second = registry.quantize(weight, statistics, scheme, SETTINGS)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(weight, kept[0])
    assert torch.equal(statistics.second_moment, kept[1])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_weights_data_type_does_not_matter(problem, name, dtype):
    weight, statistics = problem
    scheme = parse_scheme(name)
    base = registry.quantize(weight, statistics, scheme, SETTINGS)
    other = registry.quantize(weight.to(dtype), statistics, scheme, SETTINGS)
    assert torch.equal(base.codes, other.codes)
    assert torch.equal(base.scales, other.scales)


@pytest.mark.parametrize("name", [n for n in CASES if n[:3] not in ("bnb", "llm", "nvf", "ggu")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_survive_the_data_type_they_are_stored_in(problem, name, dtype):
    weight, statistics = problem
    settings = QuantizationSettings(scale_dtype=dtype)
    found = registry.quantize(weight, statistics, parse_scheme(name), settings)
    assert torch.equal(found.scales, settings.round_scales(found.scales))


def test_many_methods_at_once(problem):
    weight, statistics = problem
    schemes = [parse_scheme(name) for name in (*CASES, CASES[0])]
    together = registry.quantize_many(weight, statistics, schemes, SETTINGS)
    for scheme, found in zip(schemes, together, strict=True):
        alone = registry.quantize(weight, statistics, scheme, SETTINGS)
        assert found.scheme == scheme
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.scales, alone.scales)


def test_unknown_methods_are_told_from_those_done_elsewhere():
    with pytest.raises(InputError, match=r"unknown method 'gtpq'.* Did you mean 'gptq'"):
        registry.get_method("gtpq")
    with pytest.raises(InputError, match="'autoround' is not quantized by Advisor itself"):
        registry.get_method("autoround")


def test_group_size_is_checked_for_all_schemes_at_once(problem):
    weight, statistics = problem
    schemes = [parse_scheme(f"gptq-int4-g{size}-sym") for size in (128, 64, 80)]
    with pytest.raises(InputError) as caught:
        registry.quantize_many(weight, statistics, schemes, SETTINGS)
    assert "group_size=128" in str(caught.value)
    assert "group_size=80" in str(caught.value)
    assert "group_size=64" not in str(caught.value)
