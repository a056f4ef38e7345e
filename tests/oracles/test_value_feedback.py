"""Codes of small tables that make up for each other's errors, against slow float64 twins."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_quantizers as oracle
import torch

from advisor.errors import InputError
from advisor.methods import coupled_descent, value_feedback, wave_front
from advisor.methods.column_state import ColumnState
from advisor.methods.descent import descend
from advisor.methods.descent_steps import Couplings
from advisor.methods.errors import layer_error
from advisor.methods.outputs import output_metric
from advisor.methods.registry import quantize, quantize_each
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.microscaling import decode_e8m0, encode_e8m0
from advisor.schemes import parse_scheme

ROWS, COLUMNS, DAMPING = 9, 192, 0.05
SETTINGS = QuantizationSettings(damping=DAMPING, clip="mse")
NAMES = ("mxfp4", "mxfp8", "nvfp4")
E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [m / 8 * 2**-6 for m in range(8)] + [
    (1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)
]
WIDTHS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


def _grid(name):
    positive = E4M3 if name == "mxfp8" else E2M1
    return np.array(sorted({sign * value for sign in (-1, 1) for value in positive}))


@pytest.fixture(scope="module")
def weight():
    values = 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5))
    values[1, :64] = 0.0  # groups of zeros
    values[2] *= 2.0**-7
    return values


def _inputs(seed):
    return cases.correlated_inputs(COLUMNS, 900, seed, 0.3, 2.0)


@pytest.fixture(scope="module")
def statistics():
    return cases.make_statistics(_inputs(6), cases.joint_gradients(ROWS))


def _rounded(weight, statistics, name):
    """Round to the nearest under the scales of least error, of what others do not make up for."""
    moment = statistics.second_moment.double().numpy()
    left = oracle.variances_left(_damped(statistics.second_moment), oracle.activation_order(moment))
    own = replace(statistics, tokens=0, second_moment=torch.from_numpy(np.diag(left)).float())
    return quantize(weight, own, parse_scheme(name), SETTINGS)


def _damped(moment, share=DAMPING):
    moment = moment.double().numpy()
    return moment + share * np.diag(moment).mean() * np.eye(len(moment))


def _spread(found):
    return np.repeat(found.scales.double().numpy(), COLUMNS // found.scales.shape[1], 1)


@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_optimal_brain_surgery_for_the_found_scales(weight, statistics, name):
    found = quantize(weight, statistics, parse_scheme(name), SETTINGS)
    assert torch.equal(found.scales, _rounded(weight, statistics, name).scales)
    moment = _damped(statistics.second_moment)
    expected = oracle.brain_surgery(weight.double().numpy(), moment, _spread(found), _grid(name))
    ours = found.dequantize().double().numpy()
    # After a value at a tie the rest of its row may differ.
    same = np.isclose(ours, expected, rtol=1e-5, atol=1e-12)
    assert same.mean() > 0.95
    assert same.all(1).sum() >= ROWS - 2
    costs = [np.trace(d @ moment @ d.T) for d in (ours - weight.numpy(), expected - weight.numpy())]
    assert costs[0] == pytest.approx(costs[1], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_rows_make_up_for_the_rows_above(monkeypatch, weight, statistics, name):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", 4)
    settings = replace(SETTINGS, output_feedback=0.9)
    found = quantize(weight, statistics, parse_scheme(name), settings)
    metric = output_metric(statistics, settings, ROWS).double().numpy()
    moment, exact = _damped(statistics.second_moment), weight.double().numpy()
    scales, change = _spread(found), np.zeros(weight.shape)
    blocks = -(-ROWS // 4)
    for first in range(blocks):
        rows = np.arange(first, ROWS, blocks)
        above = np.array([row for row in range(ROWS) if row % blocks < first], dtype=int)
        pull = metric[np.ix_(rows, above)] @ change[above]
        target = exact[rows] - np.linalg.inv(metric[np.ix_(rows, rows)]) @ pull
        change[rows] = oracle.brain_surgery(target, moment, scales[rows], _grid(name)) - exact[rows]
    ours = found.dequantize().double().numpy() - exact
    costs = [np.trace(metric @ d @ moment @ d.T) for d in (ours, change)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)


def _stored_scales(name, found):
    """All scales that a checkpoint can hold, float64."""
    if name == "nvfp4":
        return np.array(E4M3[1:]) / float(found.extras["global_scale"])
    return 2.0 ** np.arange(-127, 128)


@pytest.mark.parametrize("name", NAMES)
def test_one_pass_of_descent_is_the_oracles(weight, statistics, name):
    """Per group the best scale by writing out every stored one's error, then code by code."""
    start = quantize(weight[3:6], statistics, parse_scheme(name), SETTINGS)
    settings = replace(SETTINGS, descent=1, descent_damping=DAMPING)
    found = quantize(weight[3:6], statistics, parse_scheme(name), settings)
    moment, grid, width = _damped(statistics.second_moment), _grid(name), WIDTHS[name]
    scales = start.scales.double().numpy().copy()
    exact, values = weight[3:6].double().numpy(), start.dequantize().double().numpy()
    stored = _stored_scales(name, start)
    # One global scale for the rows that are quantized together.
    for row in range(3):
        steps = values[row] / np.repeat(scales[row], width)

        def cost(steps, own, row=row):
            delta = exact[row] - steps * np.repeat(own, width)
            return delta @ moment @ delta

        for group in range(COLUMNS // width):
            options = []
            for scale in stored[np.abs(np.log2(stored / scales[row, group])) < 1.5]:
                own = scales[row].copy()
                own[group] = scale
                options.append((cost(steps, own), scale))
            if min(options)[0] < cost(steps, scales[row]) * (1 - 1e-9):
                scales[row, group] = min(options)[1]
            for column in range(group * width, (group + 1) * width):
                tried = []
                for value in grid:
                    steps[column] = value
                    tried.append((cost(steps, scales[row]), value))
                steps[column] = min(tried)[1]
        values[row] = steps * np.repeat(scales[row], width)
    assert np.isclose(found.scales.numpy(), scales, rtol=1e-5).mean() > 0.97
    ours = found.dequantize().double().numpy()
    assert np.isclose(ours, values, rtol=1e-4, atol=1e-9).mean() > 0.9
    costs = [np.trace(d @ moment @ d.T) for d in (ours - exact, values - exact)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)


class _Free:
    def round_scales(self, scales):
        return scales


@pytest.mark.parametrize("rounding", [_Free(), value_feedback.FixedScales()])
def test_no_pass_raises_the_error_and_fixed_scales_stay(weight, statistics, rounding):
    table = torch.tensor(_grid("nvfp4"), dtype=torch.float32)
    columns = weight.T.contiguous()
    scales = columns.view(-1, 16, ROWS).abs().amax(1).clamp_min(1e-3) / 6
    wide = scales.repeat_interleave(16, 0)
    nearest = (columns / wide).unsqueeze(-1).sub(table).abs().argmin(-1)
    low, high = table[0].expand_as(scales), table[-1].expand_as(scales)
    state = ColumnState(table[nearest], scales.clone(), low, high, table)
    moment = torch.tensor(_damped(statistics.second_moment))
    errors = []
    for _ in range(4):
        delta = (state.weight() - columns).double()
        errors.append((delta * (moment @ delta)).sum(0))
        descend(columns, state, Couplings(moment.float(), len(scales)), rounding, 1)
        assert bool(torch.isin(state.steps, table).all())
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
    assert float(errors[1].sum()) < 0.7 * float(errors[0].sum())
    assert torch.equal(state.scales, scales) == isinstance(rounding, value_feedback.FixedScales)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, descent=2)])
def test_errors_are_less_than_those_of_rounding(weight, statistics, name, settings):
    rounded = _rounded(weight, statistics, name)
    found = quantize(weight, statistics, parse_scheme(name), settings)
    assert layer_error(weight, found, statistics) < 0.7 * layer_error(weight, rounded, statistics)
    unseen = cases.make_statistics(_inputs(7))
    assert layer_error(weight, found, unseen) < 0.8 * layer_error(weight, rounded, unseen)


@pytest.mark.parametrize("name", NAMES)
def test_scales_stay_what_a_checkpoint_holds(weight, statistics, name):
    settings = replace(SETTINGS, descent=3, output_feedback=0.7)
    found = quantize(weight, statistics, parse_scheme(name), settings)
    moved = found.scales != _rounded(weight, statistics, name).scales
    if name == "nvfp4":
        assert bool(moved.any())
        local = found.scales * found.extras["global_scale"]
        stored = local.to(torch.float8_e4m3fn).float()
        assert torch.equal(stored / found.extras["global_scale"], found.scales)
        assert float(stored.min()) > 0
    else:
        assert torch.equal(decode_e8m0(encode_e8m0(found.scales)), found.scales)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_that_act_together_cost_less(monkeypatch, weight, statistics, name):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", 4)
    monkeypatch.setattr(coupled_descent, "DESCENT_ROWS", 4)
    costs = []
    for feedback in (0.0, 0.9):
        settings = replace(SETTINGS, descent=2, output_feedback=feedback)
        delta = quantize(weight, statistics, parse_scheme(name), settings).dequantize() - weight
        spread = statistics.gradient_moment @ delta @ statistics.second_moment
        costs.append(float(spread.mul(delta).sum()))
    assert costs[1] < 0.85 * costs[0]


def test_linears_that_an_engine_fuses_share_the_global_scale(weight, statistics):
    larger = torch.cat([3 * weight[:4], weight[:1]])
    own = replace(statistics, gradient_moment=statistics.gradient_moment[:5, :5].contiguous())
    settings = replace(SETTINGS, descent=1, output_feedback=0.7)
    scheme = parse_scheme("nvfp4-anvfp4")
    found = quantize_each([weight, larger], [statistics, own], scheme, settings)
    assert [len(part.codes) for part in found] == [ROWS, 5]
    largest = max(float(weight.abs().max()), float(larger.abs().max()))
    for part in found:
        assert float(part.extras["global_scale"]) == pytest.approx(448 * 6 / largest)
        assert "input_global_scale" in part.extras
    apart = quantize_each([larger], [own], parse_scheme("mxfp4"), settings)[0]
    beside = quantize_each([weight, larger], [statistics, own], parse_scheme("mxfp4"), settings)[1]
    assert (apart.codes == beside.codes).double().mean() > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_large_weights_are_worked_on_in_parts(monkeypatch, weight, statistics, name):
    settings = replace(SETTINGS, descent=1)
    whole = quantize(weight, statistics, parse_scheme(name), settings)
    monkeypatch.setattr(value_feedback, "_WEIGHTS_AT_ONCE", 2 * COLUMNS + 1)
    parts = quantize(weight, statistics, parse_scheme(name), settings)
    assert (parts.codes == whole.codes).double().mean() > 0.98
    quantize(weight, statistics, parse_scheme(name), replace(settings, output_feedback=0.7))


@pytest.mark.parametrize("name", NAMES)
def test_an_importance_alone_rounds_to_the_nearest(weight, statistics, name):
    diagonal = replace(statistics, second_moment=statistics.second_moment.diagonal().diag())
    found = quantize(weight, diagonal, parse_scheme(name), SETTINGS)
    torch.testing.assert_close(found.dequantize(), _rounded(weight, diagonal, name).dequantize())


def test_settings_out_of_range_are_refused(weight, statistics):
    for settings, message in (
        (replace(SETTINGS, descent=-1), "descent must not"),
        (replace(SETTINGS, damping=0.0), "damping must be above 0"),
    ):
        with pytest.raises(InputError, match=message):
            quantize(weight, statistics, parse_scheme("nvfp4"), settings)
