"""NF4 and FP4 with feedback: codes against a slow float64 twin, bytes against bitsandbytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_quantizers as oracle
import torch

from advisor.errors import InputError
from advisor.methods.errors import layer_error
from advisor.methods.registry import quantize, quantize_each
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.codebooks import FP4_VALUES, NF4_VALUES
from advisor.numerics.packing import pack_nibbles
from advisor.schemes import parse_scheme

functional = pytest.importorskip("bitsandbytes.functional")

ROWS, COLUMNS, DAMPING = 10, 256, 0.05
SETTINGS = QuantizationSettings(damping=DAMPING)
FULL = replace(SETTINGS, descent=2, clip="mse")
NAMES = ("bnb-nf4", "bnb-fp4", "bnb-nf4-dq", "bnb-nf4-g32", "bnb-fp4-g128-dq")


@pytest.fixture(scope="module")
def weight():
    values = 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    values[1, :128] = 0.0
    values[2] *= 4
    return values


def _inputs(seed):
    return cases.correlated_inputs(COLUMNS, 1100, seed, 2.0, 0.3)


@pytest.fixture(scope="module")
def statistics():
    return cases.make_statistics(_inputs(6), cases.joint_gradients(ROWS))


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_optimal_brain_surgery_for_scales_as_read_back(weight, statistics, name):
    scheme = parse_scheme(name)
    found = quantize(weight, statistics, scheme, SETTINGS)
    rounded = quantize(weight, None, scheme, SETTINGS)
    zeros = rounded.scales == 0
    atol = 1e-3 if scheme.double_quantization else 1e-11
    torch.testing.assert_close(found.scales, rounded.scales, rtol=0, atol=atol)
    moment = statistics.second_moment.double().numpy()
    moment = moment + DAMPING * np.diag(moment).mean() * np.eye(COLUMNS)
    scales = np.repeat(found.scales.double().numpy(), COLUMNS // found.scales.shape[1], 1)
    grid = np.array(NF4_VALUES if "nf4" in name else FP4_VALUES)
    expected = oracle.brain_surgery(weight.double().numpy(), moment, scales, grid)
    ours = found.dequantize().double().numpy()
    same = np.isclose(ours, expected, rtol=1e-5, atol=1e-10)
    assert same.mean() > 0.95
    assert same.all(1).sum() >= ROWS - 2
    exact = weight.double().numpy()
    costs = [np.trace(d @ moment @ d.T) for d in (ours - exact, expected - exact)]
    assert costs[0] == pytest.approx(costs[1], rel=0.01)
    assert bool(zeros.any()) != scheme.double_quantization


@pytest.mark.parametrize("settings", [FULL, replace(FULL, output_feedback=0.7)])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_reads_back_what_was_chosen(weight, statistics, name, settings):
    scheme = parse_scheme(name)
    found = quantize(weight, statistics, scheme, settings)
    extras = found.extras
    nested = {}
    if scheme.double_quantization:
        nested["state2"] = functional.QuantState(
            extras["nested_absmax"], code=extras["nested_quant_map"],
            blocksize=int(extras["nested_blocksize"]), dtype=torch.float32,
        )  # fmt: skip
        nested["offset"] = extras["offset"]
    state = functional.QuantState(
        extras["absmax"], torch.Size(weight.shape), extras["quant_map"], int(extras["blocksize"]),
        scheme.weight, torch.float32, **nested,
    )  # fmt: skip
    theirs = functional.dequantize_4bit(pack_nibbles(found.codes).view(-1, 1), state)
    assert torch.equal(theirs, found.dequantize())


@pytest.mark.parametrize("settings", [SETTINGS, FULL, replace(FULL, clip="none")])
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_less_than_those_of_rounding(weight, statistics, name, settings):
    scheme = parse_scheme(name)
    found, rounded = (quantize(weight, s, scheme, settings) for s in (statistics, None))
    assert layer_error(weight, found, statistics) < 0.7 * layer_error(weight, rounded, statistics)
    unseen = cases.make_statistics(_inputs(7))
    assert layer_error(weight, found, unseen) < 0.8 * layer_error(weight, rounded, unseen)


def test_scales_move_only_where_a_checkpoint_can_hold_others(weight, statistics):
    plain = quantize(weight, None, parse_scheme("bnb-nf4"), FULL)
    moved = quantize(weight, statistics, parse_scheme("bnb-nf4"), FULL)
    assert (moved.scales != plain.scales).double().mean() > 0.8
    assert torch.equal(moved.extras["absmax"], moved.scales.flatten())
    nested = quantize(weight, statistics, parse_scheme("bnb-nf4-dq"), FULL)
    assert nested.extras["absmax"].dtype == torch.uint8
    # Codes fitted to scales before they were rounded would not fit those after.
    read = moved.codes.long()
    careless = torch.tensor(NF4_VALUES)[read] * nested.scales.repeat_interleave(64, 1)
    assert layer_error(weight, nested, statistics) < layer_error(weight, careless, statistics)


def test_blocks_that_straddle_rows_are_rounded(weight, statistics):
    narrow = weight[:, :100].contiguous()
    own = replace(
        statistics,
        second_moment=statistics.second_moment[:100, :100].contiguous(),
        absolute_maximum=statistics.absolute_maximum[:100],
        absolute_sum=statistics.absolute_sum[:100],
    )
    for found in (
        quantize(narrow, own, parse_scheme("bnb-nf4-dq"), FULL),
        *quantize_each([narrow], [own], parse_scheme("bnb-nf4-dq"), FULL),
    ):
        rounded = quantize(narrow, None, parse_scheme("bnb-nf4-dq"), FULL)
        assert torch.equal(found.codes, rounded.codes)
        assert torch.equal(found.extras["absmax"], rounded.extras["absmax"])


def test_outputs_that_act_together_cost_less(monkeypatch, weight, statistics):
    monkeypatch.setattr("advisor.methods.wave_front.ROW_BLOCK", 4)
    monkeypatch.setattr("advisor.methods.coupled_descent.DESCENT_ROWS", 4)
    for name in ("bnb-nf4", "bnb-fp4-dq"):
        costs = []
        for feedback in (0.0, 0.9):
            settings = replace(FULL, output_feedback=feedback)
            delta = quantize(weight, statistics, parse_scheme(name), settings).dequantize() - weight
            spread = statistics.gradient_moment @ delta @ statistics.second_moment
            costs.append(float(spread.mul(delta).sum()))
        assert costs[1] < 0.85 * costs[0]


def test_linears_beside_each_other_have_their_own_scales(weight, statistics):
    own = replace(statistics, gradient_moment=statistics.gradient_moment[:6, :6].contiguous())
    settings, scheme = replace(FULL, output_feedback=0.7), parse_scheme("bnb-nf4-dq")
    other = weight[:6] * 2
    beside = quantize_each([weight, other], [statistics, own], scheme, settings)
    alone = quantize(other, own, scheme, settings)
    assert [len(part.extras["absmax"]) for part in beside] == [ROWS * 4, 24]
    assert (beside[1].codes == alone.codes).double().mean() > 0.99
    torch.testing.assert_close(beside[1].scales, alone.scales, rtol=1e-3, atol=1e-6)


def test_an_unknown_clip_is_refused(weight, statistics):
    with pytest.raises(InputError, match="clip must be"):
        quantize(weight, statistics, parse_scheme("bnb-nf4"), replace(SETTINGS, clip="max"))
