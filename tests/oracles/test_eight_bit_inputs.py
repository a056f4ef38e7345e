"""Calibrated input scales, FP8 weights, and int4 under FP8 inputs, against textbook twins."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_arithmetic as oracle
import reference_microscaling as floats
import torch
from quantizer_cases import COLUMNS, FLOAT32, double

from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model, simulate_static_fp8, simulate_static_int8
from advisor.methods.errors import layer_error
from advisor.methods.registry import quantize, quantize_many
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.int4_fp8 import kernel_scales
from advisor.schemes import parse_scheme
from advisor.search.stacking import quantize_group

SETTINGS = QuantizationSettings()


@pytest.fixture(scope="module")
def inputs():
    return cases.make_inputs(0)


@pytest.fixture(scope="module")
def weight():
    return cases.make_weight(0)


@pytest.fixture(scope="module")
def statistics(inputs):
    return cases.make_statistics(inputs)


def _tile(form, shape):
    return {"gch": (1, shape[1]), "gtensor": shape, "b16": (16, 16), "g16": (1, 16)}[form]


@pytest.mark.parametrize("form", ["gch", "gtensor", "b16", "g16"])
def test_fp8_weights_are_the_nearest_e4m3_in_every_tile(weight, form):
    found = double(quantize(weight, None, parse_scheme(f"rtn-fp8-{form}"), FLOAT32).dequantize())
    rows, columns = _tile(form, weight.shape)
    for row in range(0, weight.shape[0], rows):
        for column in range(0, weight.shape[1], columns):
            tile = (slice(row, row + rows), slice(column, column + columns))
            values = double(weight)[tile]
            scale = np.abs(values).max() / 448 or 1.0
            expected = [floats.nearest(value / scale, floats.E4M3) * scale for value in values.flat]
            # A value within float32's rounding of a tie may go either way: half a step of E4M3.
            error = np.abs(found[tile].ravel() - expected)
            assert (error <= 2**-3 * np.abs(expected) + scale * 2**-9).all()
            assert (error > 1e-6 * np.abs(expected)).sum() <= 1


@pytest.mark.parametrize(
    "name",
    ["rtn-int8-gch-sym-aint8-static", "smoothquant-int8-gch-sym-aint8-static",
     "rtn-fp8-gch-afp8-static", "gptq-fp8-gtensor-afp8-static"],
)  # fmt: skip
def test_products_with_a_calibrated_scale(weight, inputs, statistics, name):
    scheme = parse_scheme(name)
    found = quantize(weight, statistics, scheme, SETTINGS)
    largest = float(inputs.abs().max())
    limit = {"int8": 127, "fp8": 448}[scheme.activation]
    scale = float(found.extras["input_scale"])
    assert scale == pytest.approx(largest / limit, rel=2**-8)
    # Held-out inputs: some are larger than any that calibration saw, and saturate.
    tokens = cases.make_inputs(3)[:9].clone()
    tokens[4, 7] = 3 * largest
    tokens[5] *= 1e-3
    expected = oracle.static_product(double(tokens), double(found.dequantize()), scale,
                                     scheme.activation)  # fmt: skip
    model = torch.nn.Sequential(torch.nn.Linear(COLUMNS, weight.shape[0], bias=False))
    with torch.no_grad(), quantized_model(model, {"0": found}):
        ours = double(model(tokens))
    # Ties of float32 against float64: one input's step times its largest weight.
    step = {"int8": scale, "fp8": largest * 2**-3}[scheme.activation]
    assert np.abs(ours - expected).max() <= step * float(weight.abs().max())
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("kind", "limit"), [("int", 127.0), ("float", 448.0)])
def test_static_inputs_equal_compressed_tensors(inputs, kind, limit):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    arguments = QuantizationArgs(
        num_bits=8, type=kind, symmetric=True, strategy=QuantizationStrategy.TENSOR, dynamic=False
    )
    scale = (0.6 * inputs.abs().amax() / limit).reshape(1).to(torch.bfloat16).float()
    theirs = forward.fake_quantize(inputs, scale, torch.zeros_like(scale), arguments)
    ours = {"int": simulate_static_int8, "float": simulate_static_fp8}[kind](inputs, scale)
    # One divides and the other multiplies by the reciprocal: a tie may fall differently.
    different = (ours - theirs).abs() > 1e-6 * theirs.abs()
    assert different.float().mean() < 1e-3
    assert (ours.abs().amax() < inputs.abs().amax()).item()


def test_input_scales_need_statistics_and_matching_weights(weight):
    with pytest.raises(InputError, match="needs calibration statistics"):
        quantize(weight, None, parse_scheme("rtn-fp8-gch-afp8-static"), SETTINGS)
    for name in ("rtn-fp8-b128-afp8-static", "rtn-int4-g64-sym-aint8-static", "bnb-nf4-static"):
        with pytest.raises(InputError, match=r"one calibrated scale.*Drop -static"):
            parse_scheme(name)


def test_linears_that_share_an_input_share_the_scales_of_a_whole_tensor(weight, statistics):
    scheme = parse_scheme("rtn-fp8-gtensor-afp8-static")
    weights = [weight, 3 * weight[:5], 0.1 * weight[:7]]
    (result,) = quantize_group(weights, statistics, [scheme], SETTINGS, foldable=False)
    assert [found.shape for found in result.weights] == [tuple(w.shape) for w in weights]
    assert len({float(found.scales) for found in result.weights}) == 1
    assert len({float(found.extras["input_scale"]) for found in result.weights}) == 1
    for original, found in zip(weights, result.weights, strict=True):
        # E4M3 has three bits of mantissa, and a smallest step of 2^-9.
        bound = original.abs() * 2**-4 + float(found.scales) * 2**-10
        assert ((found.dequantize() - original).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("name", ["rtn-int4-g16-sym-afp8", "gptq-int4-g16-sym-afp8"])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float32"])
def test_int4_under_fp8_inputs_is_what_the_kernel_multiplies(weight, statistics, name, scale_dtype):
    settings = replace(SETTINGS, scale_dtype=scale_dtype)
    found = quantize(weight, statistics, parse_scheme(name), settings)
    values = double(found.dequantize())
    for row in range(weight.shape[0]):
        codes = (found.codes[row].int() - 8).tolist()
        expected = oracle.int4_fp8_row(codes, double(found.scales)[row].tolist(), 16)
        np.testing.assert_allclose(values[row], expected, rtol=1e-6)
    # Each row's largest scale is that of its largest weight, as plain rounding has it.
    largest = settings.round_scales(weight.abs().amax(1) / 7.5)
    live = weight.abs().amax(1) > 0
    assert torch.equal(found.scales.amax(1)[live], largest[live])


def test_rounded_int4_under_fp8_takes_the_nearest_of_its_sixteen_values(weight):
    found = quantize(weight, None, parse_scheme("rtn-int4-g16-sym-afp8"), SETTINGS)
    for row in range(weight.shape[0]):
        scales = double(found.scales)[row].tolist()
        table = np.array(
            [oracle.int4_fp8_row([code] * COLUMNS, scales, 16) for code in range(-8, 8)]
        )
        best = np.abs(table - double(weight)[row]).min(0)
        ours = np.abs(double(found.dequantize())[row] - double(weight)[row])
        np.testing.assert_allclose(ours, best, rtol=1e-5, atol=1e-7)


def test_codes_chosen_for_the_kernel_beat_those_chosen_for_the_file(weight, statistics):
    """What a checkpoint made without regard to the kernel loses in it."""
    aware = {}
    for method, share in (("rtn", 0.95), ("gptq", 1.0)):
        found = quantize(weight, statistics, parse_scheme(f"{method}-int4-g16-sym-afp8"), SETTINGS)
        plain = quantize(weight, statistics, parse_scheme(f"{method}-int4-g16-sym"), SETTINGS)
        loaded = replace(plain, scheme=found.scheme)
        aware[method] = layer_error(weight, found, statistics)
        assert aware[method] < share * layer_error(weight, loaded, statistics)
    assert aware["gptq"] < 0.9 * aware["rtn"]


def test_gptq_under_fp8_leaves_nothing_but_rounding_where_inputs_are_uncorrelated(weight):
    inputs = torch.diag(torch.linspace(0.5, 2.0, COLUMNS))
    statistics = cases.make_statistics(inputs)
    schemes = [parse_scheme(f"{m}-int4-g16-sym-afp8") for m in ("rtn", "gptq")]
    rounded, found = quantize_many(weight, statistics, schemes, SETTINGS)
    assert torch.equal(rounded.codes, found.codes)
    assert torch.equal(rounded.scales, found.scales)


def test_kernel_scales_by_hand():
    scales, channel = kernel_scales(torch.tensor([[448.0, 224.0, 100.0, 1.0, 0.001]]))
    # 100 has no E4M3 (96, 104): the even one of a tie. 0.001 is below half of 2^-9: lost.
    assert scales.tolist() == [[56.0, 28.0, 12.0, 0.125, 0.0]]
    assert channel.tolist() == [[8.0]]


@pytest.mark.parametrize("form", ["gch", "gtensor", "b16"])
def test_fp8_weights_equal_compressed_tensors(weight, form):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    from compressed_tensors.quantization import QuantizationArgs

    rows, columns = _tile(form, weight.shape)
    tiles = torch.nn.functional.pad(weight, (0, 0, 0, -weight.shape[0] % rows))
    tiles = tiles.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    strategy = {"gch": "channel", "gtensor": "tensor", "b16": "block"}[form]
    arguments = QuantizationArgs(
        num_bits=8, type="float", symmetric=True, strategy=strategy,
        block_structure=[16, 16] if form == "b16" else None,
    )  # fmt: skip
    scales, zeros = helpers.calculate_qparams(low, high, arguments)
    found = quantize(weight, None, parse_scheme(f"rtn-fp8-{form}"), SETTINGS)
    live = tiles.abs().amax((1, 3)) > 0
    assert torch.equal(found.scales[live], scales.to(torch.bfloat16).float()[live])
    shaped = found.scales.reshape(1) if form == "gtensor" else found.scales
    theirs = forward.fake_quantize(weight, shaped, zeros, arguments)
    assert torch.equal(found.dequantize(), theirs.float())
