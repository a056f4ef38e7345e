"""Weights of extreme size: every method stores them as well as others, or says why it cannot."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.formats.registry import get_format
from advisor.methods.input_scales import with_input_scale
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

TINY, HUGE = 2.0**-26, 2.0**24
"""Of weights around 0.05: around 1e-9 and 1e6."""
FLOAT16 = ("gguf-q4_0", "gguf-q4_1", "gguf-iq4_nl", "gguf-q8_0", "gguf-q2_k", "gguf-q4_k",
           "gguf-q6_k", "llm.int8")  # fmt: skip
"""What stores float16 numbers whatever the settings."""
ALWAYS = (
    "rtn-int4-g64-sym", "rtn-int3-g32-asym", "rtn-fp8-gch", "rtn-fp8-b32",
    "gptq-int4-g64-asym", "gptq-fp8-gch", "awq-int4-g64-asym", "hqq-int4-g64-asym", "bnb-nf4",
    "bnb-fp4-dq", "mxfp4", "mxfp8", "nvfp4", "nvfp4-anvfp4",
)  # fmt: skip


@pytest.fixture(scope="module")
def inputs():
    return torch.randn(300, 256, generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="module")
def statistics(inputs):
    return LayerStatistics(
        300, inputs.t() @ inputs, inputs.abs().amax(0), inputs.abs().sum(0)
    )  # fmt: skip


@pytest.fixture(scope="module")
def weight():
    values = 0.05 * torch.randn(48, 256, generator=torch.Generator().manual_seed(3))
    values[0] = 0.0
    return values


def _missed(found, weight):
    change = found.dequantize().double() - weight.double()
    return float(change.norm() / weight.double().norm())


@pytest.mark.parametrize("factor", [TINY, HUGE])
@pytest.mark.parametrize("name", ALWAYS)
def test_types_with_wide_scales_store_any_size_alike(weight, statistics, name, factor):
    scheme, settings = parse_scheme(name), QuantizationSettings(descent=1)
    usual = _missed(quantize(weight, statistics, scheme, settings), weight)
    found = quantize(weight * factor, statistics, scheme, settings)
    assert _missed(found, weight * factor) == pytest.approx(usual, rel=0.1)


@pytest.mark.parametrize("known", [False, True], ids=["alone", "statistics"])
@pytest.mark.parametrize("name", FLOAT16)
def test_weights_too_small_for_float16_are_refused(weight, statistics, name, known):
    scheme, given = parse_scheme(name), statistics if known else None
    with pytest.raises(InputError, match=r"float16.* largest weight here is 3\.\de-09.*(Use|Keep)"):
        quantize(weight * TINY, given, scheme, QuantizationSettings())
    # What is small beside others may vanish.
    mixed = weight.clone()
    mixed[1:20] *= TINY
    usual = _missed(quantize(weight, given, scheme, QuantizationSettings()), weight)
    found = quantize(mixed, given, scheme, QuantizationSettings())
    assert _missed(found, mixed) == pytest.approx(usual, rel=0.2)


@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_1", "gguf-q2_k", "llm.int8"])
def test_weights_too_large_for_float16_are_refused(weight, statistics, name):
    with pytest.raises(InputError, match=r"float16.* (65504|above 65504).*(Use|Keep)"):
        quantize(weight * HUGE, statistics, parse_scheme(name), QuantizationSettings())


@pytest.mark.parametrize("name", ["gguf-q8_0", "gguf-q4_k", "gguf-q6_k"])
def test_types_whose_factors_are_small_hold_large_weights(weight, name):
    """A Q4_K factor of 65504 stands for weights up to 65504 x 63 x 15."""
    scheme, settings = parse_scheme(name), QuantizationSettings()
    usual = _missed(quantize(weight, None, scheme, settings), weight)
    large = weight * HUGE
    assert _missed(quantize(large, None, scheme, settings), large) == pytest.approx(usual, rel=0.05)


@pytest.mark.parametrize(
    "name", ["rtn-int8-gch-sym", "gptq-int4-g64-sym", "awq-int4-g64-asym", "rtn-fp8-gch",
             "hqq-int4-g64-asym", "rtn-int4-g64-sym-afp8"],
)  # fmt: skip
def test_scales_that_float16_would_lose_are_refused(weight, statistics, name):
    settings = QuantizationSettings(scale_dtype="float16")
    with pytest.raises(InputError, match=r"float16 is too coarse for \d+ of \d+ scales.*bfloat16"):
        quantize(weight * TINY, statistics, parse_scheme(name), settings)
    mixed = weight.clone()
    mixed[1] *= TINY
    quantize(mixed, statistics, parse_scheme(name), settings)


def test_scales_that_float16_cannot_reach_are_refused(weight, statistics):
    settings = QuantizationSettings(scale_dtype="float16")
    with pytest.raises(InputError, match="larger than float16 can hold"):
        quantize(weight * HUGE, None, parse_scheme("rtn-int4-g64-sym"), settings)


def test_channels_under_fp8_inputs_end_where_the_kernel_does(weight):
    scheme, settings = parse_scheme("rtn-int4-g64-sym-afp8"), QuantizationSettings()
    with pytest.raises(InputError, match=r"scales of channels under FP8 inputs end at 4\.4e-06"):
        quantize(weight * TINY, None, scheme, settings)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_calibrated_input_scales_stay_in_range(weight, inputs, kind):
    name = {"int8": "rtn-int8-gch-sym", "fp8": "rtn-fp8-gch"}[kind]
    scheme = parse_scheme(f"{name}-a{kind}-static")
    settings = QuantizationSettings(scale_dtype="float16")
    codes = quantize(
        weight, _of(inputs), scheme, QuantizationSettings()
    )  # fmt: skip
    with pytest.raises(InputError, match="too coarse for 1 of 1 scales"):
        with_input_scale(codes, _of(inputs * 2.0**-30), settings)
    with pytest.raises(InputError, match="larger than float16 can hold"):
        with_input_scale(codes, _of(inputs * 2.0**30), settings)


def _of(inputs):
    return LayerStatistics(300, inputs.t() @ inputs, inputs.abs().amax(0), inputs.abs().sum(0))


@pytest.mark.parametrize(
    ("format_name", "name"),
    [("gptq", "gptq-int4-g64-sym"), ("awq", "awq-int4-g64-asym"),
     ("compressed-tensors", "rtn-int8-gch-sym")],
)  # fmt: skip
def test_a_float16_models_loader_would_lose_small_scales(weight, statistics, format_name, name):
    """A file may hold bfloat16 beside float16 weights, but the loader casts."""
    found = quantize(weight * TINY, statistics, parse_scheme(name), QuantizationSettings())
    form = get_format(format_name)
    config = form.quantization_config({"m": found}, [])
    with pytest.raises(InputError, match="m: the model computes in float16, which has no number"):
        form.pack("m", found, config, torch.float16)
    stored = form.pack("m", found, config, torch.bfloat16)
    scales = next(value for key, value in stored.items() if key.endswith(("scales", "scale")))
    assert scales.dtype == torch.bfloat16
    assert float(scales.float().max()) == float(found.scales.max())
