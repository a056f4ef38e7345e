"""MXFP4, MXFP8, NVFP4 and grouped FP8 against their textbook twins in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reference_microscaling as oracle
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.evaluation.runtime import activation_simulation
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.codebooks import decode_e4m3
from advisor.numerics.microscaling import (
    E2M1_VALUES,
    decode_e8m0,
    e2m1_codebook,
    encode_e2m1,
    encode_e8m0,
    pack_e2m1,
    round_e2m1,
    unpack_e2m1,
)
from advisor.schemes import parse_scheme

ROWS, COLUMNS = 7, 160
TABLES = {"mxfp4": oracle.E2M1, "mxfp8": oracle.E4M3}


@pytest.fixture(scope="module")
def weight():
    """Heavy tails, blocks of very different sizes, one of zeros, one with its maximum near 2^k."""
    generator = np.random.default_rng(3)
    values = generator.standard_t(3, size=(ROWS, COLUMNS)) * np.exp(
        3 * generator.normal(size=(ROWS, COLUMNS // 32)).repeat(32, 1)
    )
    values[2, 32:64] = 0.0
    values[3, :32] *= 1.9 / np.abs(values[3, :32]).max()
    values[4, :32] *= 2.0 / np.abs(values[4, :32]).max()
    values[5, 64:96] *= 2.0**-30
    return torch.tensor(values, dtype=torch.float32)


def _blocks(tensor, width, function):
    rows = []
    for row in tensor.double().numpy():
        starts = range(0, len(row), width)
        rows.append(np.concatenate([function(row[i : i + width]) for i in starts]))
    return np.array(rows)


def _statistics(weight):
    return LayerStatistics(
        tokens=len(weight),
        second_moment=weight.t() @ weight,
        absolute_maximum=weight.abs().amax(0),
        absolute_sum=weight.abs().sum(0),
    )


def test_e2m1_by_bit_pattern_and_its_ties():
    assert list(E2M1_VALUES[:8]) == oracle.E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.linspace(-8, 8, 641)
    found = [E2M1_VALUES[code] for code in encode_e2m1(values).tolist()]
    assert found == [oracle.nearest(value, oracle.E2M1) for value in values.tolist()]
    # The sign of what rounds to zero is kept.
    assert encode_e2m1(torch.tensor([-0.1, 0.1, 2.5, 5.0, 3.5])).tolist() == [8, 0, 4, 6, 6]


def test_e4m3_has_the_values_of_its_layout():
    assert decode_e4m3(torch.arange(127, dtype=torch.uint8)).tolist() == oracle.E4M3


def test_e8m0_covers_its_whole_range():
    codes = torch.arange(255, dtype=torch.uint8)
    assert decode_e8m0(codes).double().tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert torch.equal(encode_e8m0(decode_e8m0(codes)), codes)


def test_the_even_input_is_in_the_low_nibble():
    codes = torch.tensor([[1, 15, 7, 8]], dtype=torch.uint8)
    assert pack_e2m1(codes).tolist() == [[0xF1, 0x87]]
    assert torch.equal(unpack_e2m1(pack_e2m1(codes)), codes)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_weights_take_the_better_of_two_exponents(weight, name):
    found = quantize(weight, None, parse_scheme(name), QuantizationSettings())
    scales = _blocks(weight, 32, lambda part: [oracle.mx_weight_block(part, TABLES[name])[0]])
    values = _blocks(weight, 32, lambda part: oracle.mx_weight_block(part, TABLES[name])[1])
    specified = _blocks(weight, 32, lambda part: [oracle.mx_block(part, TABLES[name])[0]])
    assert set(np.unique(scales / specified)) == {1.0, 2.0}
    np.testing.assert_array_equal(found.scales.double().numpy(), scales)
    np.testing.assert_array_equal(found.dequantize().double().numpy(), values)


def test_nvfp4_weights_follow_the_definition(weight):
    found = quantize(weight, None, parse_scheme("nvfp4"), QuantizationSettings())
    global_scale = float(np.float32(448 * 6 / weight.abs().max().double().item()))
    assert float(found.extras["global_scale"]) == pytest.approx(global_scale, rel=1e-7)
    global_scale = float(found.extras["global_scale"])
    scales = _blocks(weight, 16, lambda part: [oracle.nvfp4_block(part, global_scale)[0]])
    values = _blocks(weight, 16, lambda part: oracle.nvfp4_block(part, global_scale)[1])
    np.testing.assert_allclose(found.scales.double().numpy() * global_scale, scales, rtol=3e-7)
    np.testing.assert_allclose(found.dequantize().double().numpy(), values, rtol=3e-7)
    # Groups far below the largest one keep a scale above zero.
    assert scales.min() == 2.0**-9


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_error_is_not_above_that_of_compressed_tensors(weight, name):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    arguments = presets.PRESET_SCHEMES[f"{name.upper()}A16"]["weights"]
    groups = weight.unflatten(-1, (-1, 32))
    scales, zeros = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    theirs = forward.fake_quantize(weight, scales.float(), zeros, arguments)
    found = quantize(weight, None, parse_scheme(name), QuantizationSettings()).dequantize()
    error = (found - weight).square().unflatten(-1, (-1, 32)).sum(-1)
    # In every block: both have the exponents of a common few.
    assert (error <= 1.00001 * (theirs - weight).square().unflatten(-1, (-1, 32)).sum(-1)).all()


def test_nvfp4_equals_compressed_tensors(weight):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    presets = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    arguments = presets.PRESET_SCHEMES["NVFP4A16"]["weights"]
    overall = helpers.generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    groups = weight.unflatten(-1, (-1, 16))
    scales, zeros = helpers.calculate_qparams(
        groups.amin(-1), groups.amax(-1), arguments, global_scale=overall
    )
    theirs = forward.fake_quantize(weight, scales, zeros, arguments, global_scale=overall)
    found = quantize(weight, None, parse_scheme("nvfp4"), QuantizationSettings())
    assert torch.equal(found.extras["global_scale"], overall)
    # Where a scale would be zero they take 1/8, and we the smallest that E4M3 has.
    ordinary = (found.scales * overall > 2.0**-9).repeat_interleave(16, 1)
    difference = (found.dequantize() - theirs).abs()[ordinary]
    assert ordinary.float().mean() > 0.8
    assert (difference <= 1e-6 * theirs.abs()[ordinary]).all()
    error = [(values - weight).square().sum() for values in (found.dequantize(), theirs)]
    assert error[0] <= 1.001 * error[1]


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_the_clip_search_never_adds_error(weight, name):
    # Without tokens there is an importance, but no feedback.
    scheme, statistics = parse_scheme(name), replace(_statistics(weight), tokens=0)
    plain, searched = (
        quantize(weight, statistics, scheme, QuantizationSettings(clip=clip))
        for clip in ("none", "mse")
    )
    importance = statistics.second_moment.diagonal().double()
    width = 16 if name == "nvfp4" else 32

    def losses(found):
        error = (found.dequantize().double() - weight.double()).square() * importance
        return error.view(ROWS, -1, width).sum(-1)

    before = losses(plain)
    shares = (losses(searched) / before)[before > 0]
    assert float(shares.max()) <= 1 + 1e-6
    if name == "nvfp4":
        assert float(shares.mean()) < 0.99


@pytest.mark.parametrize(("name", "rule"), [("mxfp4", "even"), ("mxfp8", "ceil")])
def test_mx_inputs_as_kernels_round_them(weight, name, rule):
    simulate = activation_simulation(parse_scheme(f"{name}-a{name}"))
    values = _blocks(weight, 32, lambda part: oracle.mx_block(part, TABLES[name], rule)[1])
    np.testing.assert_array_equal(simulate(weight).double().numpy(), values)


def test_nvfp4_inputs_use_the_calibrated_scale(weight):
    scheme = parse_scheme("nvfp4-anvfp4")
    weights = quantize(weight, _statistics(weight / 2), scheme, QuantizationSettings())
    scale = float(weights.extras["input_global_scale"])
    assert scale == pytest.approx(2 * 448 * 6 / float(weight.abs().max()), rel=1e-6)
    found = activation_simulation(scheme, weights.extras)(weight)
    # Inputs beyond those of calibration saturate: the largest group's scale stops at 448.
    values = _blocks(weight, 16, lambda part: oracle.nvfp4_block(part, scale)[1])
    np.testing.assert_allclose(found.double().numpy(), values, rtol=3e-7)
    assert float(found.abs().max()) < 0.6 * float(weight.abs().max())


def test_block_fp8_rounds_inputs_in_groups_of_the_block(weight):
    found = activation_simulation(parse_scheme("rtn-fp8-b32-afp8"))(weight)
    values = _blocks(weight, 32, oracle.fp8_block)
    error = np.abs(found.double().numpy() - values)
    # float32 may decide a tie otherwise; then it is a step of 1/8 at most.
    assert (error <= np.abs(values) / 8 + 1e-12).all()
    assert (error > 1e-6 * np.abs(values)).sum() <= 2


def test_groups_must_divide_and_inputs_need_statistics(weight):
    with pytest.raises(InputError, match="32 inputs, which must divide in_features"):
        quantize(weight[:, :80], None, parse_scheme("mxfp4"), QuantizationSettings())
    with pytest.raises(InputError, match="needs calibration statistics"):
        quantize(weight, None, parse_scheme("nvfp4-anvfp4"), QuantizationSettings())


def test_rounding_to_e2m1_is_encoding_and_decoding():
    steps = torch.arange(-2000, 2001) / 250  # all ties are among them
    values = torch.cat([steps, torch.randn(4096) * 3, torch.tensor([-0.0, 1e9, -1e9, 1e-30])])
    expected = e2m1_codebook()[encode_e2m1(values).long()]
    found = round_e2m1(values)
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())
