"""HQQ against its textbook twin, and against the authors' library where it is installed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_hqq as oracle
import reference_quantizers as quantizers
import torch
from quantizer_cases import FLOAT32, double

from advisor.errors import InputError
from advisor.formats.registry import get_format
from advisor.methods import coupled_descent
from advisor.methods.errors import layer_error
from advisor.methods.real_zeros import GridState, regrid
from advisor.methods.registry import quantize, quantize_each
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

DESCENT = QuantizationSettings(damping=0.05, descent=2)


@pytest.fixture(scope="module")
def weight():
    """Four groups of 64 to a row and outliers, so that the mean is not the middle."""
    generator = torch.Generator().manual_seed(4)
    values = 0.03 * torch.randn(24, 256, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.02] *= 6
    return values


@pytest.fixture(scope="module")
def statistics():
    inputs = cases.correlated_inputs(256, 1100, 6, 2.0, 0.3)
    return cases.make_statistics(inputs, cases.joint_gradients(24))


@pytest.mark.parametrize("name", ["hqq-int4-g64-asym", "hqq-int3-g64-asym", "hqq-int2-g32-asym"])
def test_zero_points_are_those_of_the_solver(weight, name):
    scheme = parse_scheme(name)
    found = quantize(weight, None, scheme, FLOAT32)
    width, levels = int(scheme.group_size), 2 ** int(scheme.bits) - 1
    groups = double(weight).reshape(-1, width)
    scales, zeros, steps = oracle.zero_points(groups.tolist(), levels)
    assert 1 < steps < oracle.STEPS or scheme.bits == 2  # the mean error says when to stop
    np.testing.assert_allclose(double(found.scales).ravel(), scales, rtol=1e-6)
    # A code at a tie moves the mean of its group by 1 / width.
    near = np.abs(double(found.zero_points).ravel() - zeros)
    assert (near < 2e-4).mean() > 0.97
    assert near.max() < 2.5 / width
    first = -groups.min(1) / scales
    assert (np.abs(zeros - first) > 0.01).mean() > 0.5
    codes = found.codes.view(-1, width).tolist()
    stored = found.zero_points.ravel().tolist()
    for group, scale, zero, ours in zip(groups, scales, stored, codes, strict=True):
        assert ours == oracle.encode(group.tolist(), scale, zero, levels)


def _surgery(weight, statistics, found, levels, damping):
    """The codes of the textbook's column loop for the grids that were found."""
    moment = statistics.second_moment.double().numpy()
    moment = moment + damping * np.diag(moment).mean() * np.eye(len(moment))
    spread = [np.repeat(double(part), 64, 1) for part in (found.scales, found.zero_points)]
    target = double(weight) + spread[0] * spread[1]
    return target, moment, quantizers.brain_surgery(
        target, moment, spread[0], np.arange(levels + 1.0)
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_are_those_of_optimal_brain_surgery_for_the_solvers_grids(
    weight, statistics, bits, dtype
):
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    settings = QuantizationSettings(damping=0.05, scale_dtype=dtype)
    found = quantize(weight, statistics, scheme, settings)
    alone = quantize(weight, None, scheme, settings)
    assert torch.equal(found.scales, alone.scales)
    assert torch.equal(found.zero_points, alone.zero_points)
    target, moment, expected = _surgery(weight, statistics, found, 2**bits - 1, 0.05)
    ours = double(found.codes.float()) * np.repeat(double(found.scales), 64, 1)
    same = np.isclose(ours, expected, rtol=1e-5, atol=1e-7)
    assert same.mean() > 0.95
    costs = [np.trace(d @ moment @ d.T) for d in (ours - target, expected - target)]
    assert costs[0] == pytest.approx(costs[1], rel=0.01)


def test_grids_move_to_where_the_error_is_least(weight, statistics):
    scheme = parse_scheme("hqq-int3-g64-asym")
    found = quantize(weight, statistics, scheme, FLOAT32)
    moment = statistics.second_moment
    state = GridState(
        found.codes.t().float().contiguous(), found.scales.t().contiguous(),
        found.zero_points.t().contiguous(), 7.0,
    )  # fmt: skip
    expected = oracle.regrid(
        double(weight), double(found.codes.float()), double(found.scales),
        double(found.zero_points), moment.double().numpy(),
    )  # fmt: skip
    regrid(weight.t().contiguous(), state, moment, FLOAT32)
    np.testing.assert_allclose(double(state.scales.t()), expected[0], rtol=2e-3)
    np.testing.assert_allclose(double(state.zeros.t()), expected[1], atol=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_pass_raises_the_error(weight, statistics, dtype):
    scheme = parse_scheme("hqq-int3-g64-asym")
    costs = []
    for passes in range(4):
        settings = QuantizationSettings(
            damping=0.05, descent=passes, descent_damping=1e-6, scale_dtype=dtype
        )
        found = quantize(weight, statistics, scheme, settings)
        for part in (found.scales, found.zero_points):
            assert torch.equal(part, settings.round_scales(part))
        assert int(found.codes.max()) <= 7
        costs.append(layer_error(weight, found.dequantize(), statistics))
    assert costs[1] < 0.97 * costs[0]
    assert costs[3] <= costs[2] <= costs[1]


@pytest.mark.parametrize(
    "settings",
    [DESCENT, replace(DESCENT, descent=0), replace(DESCENT, output_feedback=0.7)],
    ids=["descent", "columns", "coupled"],
)
@pytest.mark.parametrize("bits", [2, 4])
def test_errors_on_other_inputs_are_well_below_those_without_statistics(
    weight, statistics, settings, bits
):
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    others = cases.make_statistics(cases.correlated_inputs(256, 1100, 9, 2.0, 0.3))
    alone = layer_error(weight, quantize(weight, None, scheme, settings).dequantize(), others)
    found = layer_error(weight, quantize(weight, statistics, scheme, settings).dequantize(), others)
    assert found < 0.8 * alone


def test_outputs_that_act_together_cost_less(monkeypatch, weight, statistics):
    monkeypatch.setattr(coupled_descent, "DESCENT_ROWS", 6)
    scheme = parse_scheme("hqq-int3-g64-asym")
    gradients = statistics.gradient_moment

    def cost(settings):
        change = quantize(weight, statistics, scheme, settings).dequantize() - weight
        return float(torch.trace(gradients @ change @ statistics.second_moment @ change.t()))

    assert cost(replace(DESCENT, output_feedback=0.9)) < 0.9 * cost(DESCENT)


def test_linears_beside_each_other_have_their_own_grids(weight, statistics):
    scheme = parse_scheme("hqq-int4-g64-asym")
    halves = [weight[:10], weight[10:]]
    inputs = replace(statistics, gradient_moment=None)
    together = quantize_each(halves, [inputs, inputs], scheme, DESCENT)
    for part, found in zip(halves, together, strict=True):
        alone = quantize(part, inputs, scheme, DESCENT)
        assert torch.equal(found.codes, alone.codes)
        assert torch.equal(found.zero_points, alone.zero_points)


def test_real_zero_points_beat_rounding_and_integer_ones_would_not(weight):
    """Why no format with integer zero points holds them."""
    found = quantize(weight, None, parse_scheme("hqq-int3-g64-asym"), FLOAT32)
    rounded = quantize(weight, None, parse_scheme("rtn-int3-g64-asym"), FLOAT32)

    def error(values):
        return float((values - weight).square().mean())

    assert error(found.dequantize()) < 0.99 * error(rounded.dequantize())
    scales = found.scales.repeat_interleave(64, 1)
    zeros = found.zero_points.round().clamp(0, 7).repeat_interleave(64, 1)
    codes = (weight / scales + zeros).round().clamp(0, 7)
    assert error((codes - zeros) * scales) > error(found.dequantize())


def test_stored_zero_points_are_those_that_codes_were_chosen_with(weight):
    settings = QuantizationSettings(scale_dtype="bfloat16")
    found = quantize(weight, None, parse_scheme("hqq-int4-g64-asym"), settings)
    for part in (found.scales, found.zero_points):
        assert torch.equal(part, part.to(torch.bfloat16).float())
    steps = (weight / found.scales.repeat_interleave(64, 1)).view(24, 4, 64)
    codes = (steps + found.zero_points[:, :, None]).round().clamp(0, 15)
    assert torch.equal(codes.to(torch.uint8).view(24, 256), found.codes)


def test_groups_without_a_range():
    values = torch.zeros(4, 192)
    values[1] = 0.25
    values[2, 64:] = 1e-6 * torch.arange(128)
    found = quantize(values, None, parse_scheme("hqq-int4-g64-asym"), FLOAT32)
    assert torch.equal(found.dequantize()[:2], values[:2])
    assert (found.dequantize() - values)[2].abs().max() < 4e-6


@pytest.mark.parametrize("name", ["hqq-int4-g64-sym", "hqq-int4-gch-asym", "hqq-int7-g64-asym"])
def test_what_hqq_does_not_have_is_refused(weight, name):
    with pytest.raises(InputError, match=r"hqq stores int2, int3.*Use for example hqq-int4-g64"):
        quantize(weight, None, parse_scheme(name), FLOAT32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_statistics_codes_and_grids_are_the_librarys(weight, bits):
    library = pytest.importorskip("hqq.core.quantize").Quantizer
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    found = quantize(weight, None, scheme, FLOAT32)
    codes, meta = library.quantize(
        weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32,
        bitpack=False,
    )  # fmt: skip
    assert (codes.view(24, 256).to(torch.uint8) == found.codes).float().mean() > 0.999
    torch.testing.assert_close(meta["scale"].view(24, 4), found.scales)
    near = (meta["zero"].view(24, 4) - found.zero_points).abs()
    assert (near < 1e-3).float().mean() > 0.97


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_not_above_the_librarys(weight, statistics, bits):
    library = pytest.importorskip("hqq.core.quantize").Quantizer
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    found = quantize(weight, statistics, scheme, FLOAT32).dequantize()
    codes, meta = library.quantize(
        weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
    )
    meta["compute_dtype"] = torch.float32
    theirs = library.dequantize(codes, meta)
    others = cases.make_statistics(cases.correlated_inputs(256, 1100, 9, 2.0, 0.3))
    assert layer_error(weight, found, others) <= 0.8 * layer_error(weight, theirs, others)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_librarys_linear_reads_what_we_store(weight, bits):
    linear_type = pytest.importorskip("hqq.core.quantize").HQQLinear
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    found = quantize(weight, None, scheme, QuantizationSettings())
    tensors = get_format("hqq").pack("m", found, {}, torch.bfloat16)
    linear = linear_type(None, None, compute_dtype=torch.bfloat16, device="cpu")
    linear.load_state_dict({name.removeprefix("m."): value for name, value in tensors.items()})
    assert (linear.out_features, linear.in_features) == found.shape
    # It computes with bfloat16 codes and zero points: two roundings where ours has none.
    theirs = linear.dequantize().float()
    scales = found.scales.repeat_interleave(64, 1)
    assert ((theirs - found.dequantize()).abs() <= 2**-7 * scales * 2**bits).all()
    linear.meta["compute_dtype"] = torch.float32
    assert torch.equal(linear.dequantize().float(), found.dequantize())
