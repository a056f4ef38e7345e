"""GGUF codes that make up for each other's errors, against slow float64 twins, step by step."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import quantizer_cases as cases
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.errors import InputError
from advisor.methods import coupled_descent, wave_front
from advisor.methods import gguf as gguf_method
from advisor.methods.descent import damped_moment
from advisor.methods.descent_steps import Couplings
from advisor.methods.errors import layer_error
from advisor.methods.gguf import quantize, quantize_blocks, quantize_each, quantize_many
from advisor.methods.gguf_descent import descend_blocks
from advisor.methods.gguf_state import SMALLEST_FACTOR, BlockState
from advisor.methods.outputs import output_metric
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.numerics.gguf_blocks import BLOCK_TYPES, code_values, pack_blocks
from advisor.schemes import parse_scheme
from advisor.workflows.texts import draw

ROWS, COLUMNS, DAMPING = 9, 512, 0.05
TYPES = tuple(BLOCK_TYPES)
SETTINGS = QuantizationSettings(damping=DAMPING)


@pytest.fixture(scope="module")
def weight():
    values = 0.05 * torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(5))
    values[1, :256] = 0.0  # a block of zeros
    values[2, 300:316] = 0.0  # a group of zeros
    values[3] = values[3].abs() + 0.2
    return values


def _inputs(seed):
    """Correlated: sixty directions and some noise."""
    mix = torch.randn(60, COLUMNS, generator=torch.Generator().manual_seed(1)) / 8
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1500, 60, generator=generator) @ mix
    noise = 0.3 * torch.randn(1500, COLUMNS, generator=generator)
    return (common + noise) * torch.linspace(0.3, 2.0, COLUMNS)


@pytest.fixture(scope="module")
def statistics():
    return cases.make_statistics(_inputs(6), cases.joint_gradients(ROWS))


def _scheme(name):
    return parse_scheme(f"gguf-{name}")


def _fields(found, name):
    """Scale and minimum of every weight, float64 [out, in], from the fields a file stores."""
    kind = BLOCK_TYPES[name]
    groups = kind.weights // kind.width
    part = {key: value.double().numpy() for key, value in found.extras.items()}
    scales = np.repeat(part["d"], groups, 1) * part.get("s", 1.0)
    minimums = np.zeros_like(scales)
    if kind.has_minimum:
        minimums = np.repeat(part["dmin"], groups, 1) * part.get("m", -1.0)
    return np.repeat(scales, kind.width, 1), np.repeat(minimums, kind.width, 1)


def _damped(moment, share):
    moment = moment.double().numpy()
    return moment + share * np.diag(moment).mean() * np.eye(len(moment))


def _obs(target, moment, scales, minimums, grid):
    """Optimal brain surgeon: after each rounding the best change of all weights still free."""
    target = target.copy()
    codes = np.zeros(target.shape, dtype=int)
    order = np.argsort(-np.diag(moment), kind="stable")
    inverse = np.linalg.inv(moment)
    for column in order:
        values = scales[:, column, None] * grid - minimums[:, column, None]
        codes[:, column] = np.abs(values - target[:, column, None]).argmin(1)
        error = target[:, column] - values[np.arange(len(target)), codes[:, column]]
        target -= np.outer(error / inverse[column, column], inverse[column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes


@pytest.mark.parametrize("name", ["q4_1", "q5_0", "iq4_nl", "q8_0", "q2_k", "q3_k", "q4_k"])
def test_codes_are_those_of_optimal_brain_surgery_for_the_fitted_fields(weight, statistics, name):
    found = quantize(weight, statistics, _scheme(name), SETTINGS)
    rounded = quantize_blocks(weight, _scheme(name), statistics.second_moment.diagonal())
    for field, value in found.extras.items():
        if field != "minimums":  # zeros became the least there is
            old = rounded.extras[field].float()
            least = SMALLEST_FACTOR if field == "d" else 1
            expected = torch.where(old == 0, least, old) if field in "ds" else old
            torch.testing.assert_close(value.float(), expected, rtol=0, atol=0)
    grid = code_values(name).double().numpy()
    moment = _damped(statistics.second_moment, DAMPING)
    expected = _obs(weight.double().numpy(), moment, *_fields(found, name), grid)
    # Near ties float32 may round the other way, which changes what comes after it in that row.
    same = found.codes.numpy() == expected
    assert same[0].mean() > 0.99
    assert same[np.abs(weight.numpy()).min(1) > 0].mean() > 0.98
    scales, minimums = _fields(found, name)
    ours = found.dequantize().double().numpy() - weight.double().numpy()
    theirs = scales * grid[expected] - minimums - weight.double().numpy()
    costs = [np.einsum("ij,jk,ik->", delta, moment, delta) for delta in (ours, theirs)]
    assert costs[0] == pytest.approx(costs[1], rel=0.01)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q6_k"])
def test_rows_make_up_for_the_rows_above(monkeypatch, weight, statistics, name):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", 4)
    settings = replace(SETTINGS, output_feedback=0.9)
    found = quantize(weight, statistics, _scheme(name), settings)
    metric = output_metric(statistics, settings, ROWS).double().numpy()
    grid = code_values(name).double().numpy()
    moment, exact = _damped(statistics.second_moment, DAMPING), weight.double().numpy()
    scales, minimums = _fields(found, name)
    change, codes = np.zeros_like(exact), np.zeros(exact.shape, dtype=int)
    blocks = -(-ROWS // 4)
    for first in range(blocks):
        rows = np.arange(first, ROWS, blocks)
        above = np.array([row for row in range(ROWS) if row % blocks < first], dtype=int)
        pull = metric[np.ix_(rows, above)] @ change[above]
        target = exact[rows] - np.linalg.inv(metric[np.ix_(rows, rows)]) @ pull
        codes[rows] = _obs(target, moment, scales[rows], minimums[rows], grid)
        change[rows] = scales[rows] * grid[codes[rows]] - minimums[rows] - exact[rows]
    ours = found.dequantize().double().numpy() - exact
    costs = [np.trace(metric @ d @ moment @ d.T) for d in (ours, change)]
    assert costs[0] == pytest.approx(costs[1], rel=0.02)
    assert (found.codes.numpy() == codes)[0].mean() > 0.99


class _Row:
    """One row in float64: every choice by writing out the error it would leave."""

    def __init__(self, name, weight, moment, codes, fields):
        self.kind, self.grid = BLOCK_TYPES[name], code_values(name).double().numpy()
        self.weight, self.moment = weight.double().numpy(), moment
        self.codes = codes.numpy().astype(int)
        self.f = {key: value.double().numpy().copy() for key, value in fields.items()}

    def quantized(self, codes=None, **changed):
        f = {**self.f, **changed}
        groups = self.kind.weights // self.kind.width
        spread = np.repeat(np.repeat(f["d"], groups) * f.get("s", 1.0), self.kind.width)
        values = spread * self.grid[self.codes if codes is None else codes]
        if self.kind.has_minimum:
            low = np.repeat(f["dmin"], groups) * f.get("m", -1.0)
            values = values - np.repeat(low, self.kind.width)
        return values

    def cost(self, **changed):
        delta = self.weight - self.quantized(**changed)
        return delta @ self.moment @ delta

    def descend(self):
        groups = self.kind.weights // self.kind.width
        for block in range(len(self.f["d"])):
            self._factors(block)
            for group in range(block * groups, (block + 1) * groups):
                if self.kind.scale_levels:
                    self._group(group, block)
                for column in range(group * self.kind.width, (group + 1) * self.kind.width):
                    self._code(column)

    def _factors(self, block):
        """Least squares in the metric H by numpy, rounded to float16, kept if the error falls."""
        names = ["d", "dmin"] if self.kind.has_minimum else ["d"]
        unit = []
        for name in names:
            only = {key: np.zeros_like(self.f[key]) for key in names}
            only[name][block] = 1.0
            unit.append(self.quantized(**only))
        nothing = {name: self.f[name].copy() for name in names}
        for name in names:
            nothing[name][block] = 0.0
        root = np.linalg.cholesky(self.moment).T
        rest = self.weight - self.quantized(**nothing)
        best, *_ = np.linalg.lstsq(root @ np.stack(unit, 1), root @ rest, rcond=None)
        tried = {name: self.f[name].copy() for name in names}
        for name, value in zip(names, best, strict=True):
            rounded = float(np.float16(value))
            if rounded != 0 and not (self.kind.scale_levels and len(names) == 2 and rounded < 0):
                tried[name][block] = rounded
        if self.cost(**tried) < self.cost():
            self.f.update(tried)

    def _group(self, group, block):
        kind, s = self.kind, self.f["s"]
        low, high = (1, kind.scale_levels) if kind.has_minimum else (
            -kind.scale_levels, kind.scale_levels - 1
        )  # fmt: skip

        def with_s(value):
            changed = s.copy()
            changed[group] = value
            return changed

        one, two, three = (self.cost(s=with_s(s[group] + step)) for step in (-1, 0, 1))
        curve, slope = one - 2 * two + three, (three - one) / 2
        ideal = np.round(-slope / curve) if curve > 1e-9 * two else 0
        options = {0, ideal, -3, -2, -1, 1, 2, 3}
        best = (self.cost(), s, self.f.get("m"))
        for step in options:
            value = np.clip(s[group] + step, low, high) or s[group]
            changed, minimums = with_s(value), self.f.get("m")
            if kind.has_minimum:
                costs = []
                for m in range(kind.scale_levels + 1):
                    minimums = self.f["m"].copy()
                    minimums[group] = m
                    costs.append((self.cost(s=changed, m=minimums), m))
                minimums[group] = min(costs)[1]
                cost = self.cost(s=changed, m=minimums)
            else:
                cost = self.cost(s=changed)
            if cost < best[0] * (1 - 1e-9):
                best = (cost, changed, minimums)
        self.f["s"] = best[1]
        if kind.has_minimum:
            self.f["m"] = best[2]

    def _code(self, column):
        costs = []
        for code in range(len(self.grid)):
            codes = self.codes.copy()
            codes[column] = code
            costs.append(self.cost(codes=codes))
        self.codes[column] = int(np.argmin(costs))


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q2_k", "q3_k", "q4_k"])
def test_one_pass_of_descent_is_the_oracles(name):
    columns = COLUMNS if BLOCK_TYPES[name].weights == 256 else 96
    generator = torch.Generator().manual_seed(3)
    weight = 0.05 * torch.randn(2, columns, generator=generator)
    x = torch.randn(2 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=generator))
    moment = x.T @ x + 0.05 * (x**2).sum(0).mean() * torch.eye(columns)
    start = quantize_blocks(weight, _scheme(name))
    state = BlockState.of(name, start.codes, dict(start.extras))
    fields = state.fields()
    descend_blocks(weight.T.contiguous(), state, Couplings(moment, len(state.s)), 1)
    for row in range(2):
        own = {key: value[row] for key, value in fields.items()}
        oracle = _Row(name, weight[row], moment.double().numpy(), start.codes[row], own)
        before = oracle.cost()
        oracle.descend()
        delta = (weight[row] - state.weight()[:, row]).double().numpy()
        assert oracle.cost() < 0.9 * before
        assert delta @ oracle.moment @ delta == pytest.approx(oracle.cost(), rel=0.02)
        found = state.fields()
        for key in own:
            assert np.isclose(found[key][row].numpy(), oracle.f[key], rtol=1e-3).mean() > 0.9
        assert (state.stored_codes()[row].numpy() == oracle.codes).mean() > 0.9


@pytest.mark.parametrize("name", TYPES)
def test_no_pass_raises_the_error_and_fields_are_what_a_file_holds(weight, statistics, name):
    start = quantize_blocks(weight, _scheme(name), statistics.second_moment.diagonal())
    state = BlockState.of(name, start.codes, dict(start.extras))
    moment = damped_moment(statistics.second_moment, SETTINGS)
    exact, couplings = moment.double(), Couplings(moment, len(state.s))
    columns = weight.T.contiguous()
    errors = []
    for _ in range(4):
        delta = (state.weight() - columns).double()
        errors.append((delta * (exact @ delta)).sum(0))
        descend_blocks(columns, state, couplings, 1)
        blocks = pack_blocks(name, state.stored_codes(), state.fields())
        theirs = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
        np.testing.assert_allclose(theirs, state.weight().T.numpy(), atol=1e-6)
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
    assert float(errors[1].sum()) < 0.7 * float(errors[0].sum())


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("settings", [SETTINGS, replace(SETTINGS, descent=2)])
def test_the_error_is_less_than_that_of_rounding_on_inputs_seen_and_not(
    weight, statistics, name, settings
):
    rounded = quantize_blocks(weight, _scheme(name), statistics.second_moment.diagonal())
    found = quantize(weight, statistics, _scheme(name), settings)
    assert layer_error(weight, found, statistics) < 0.8 * layer_error(weight, rounded, statistics)
    unseen = cases.make_statistics(_inputs(7))
    assert layer_error(weight, found, unseen) < 0.95 * layer_error(weight, rounded, unseen)


@pytest.mark.parametrize("name", ["q4_0", "iq4_nl", "q5_1", "q3_k", "q4_k"])
def test_outputs_that_act_together_cost_less(monkeypatch, weight, statistics, name):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", 4)
    monkeypatch.setattr(coupled_descent, "DESCENT_ROWS", 4)
    costs = []
    for feedback in (0.0, 0.9):
        settings = replace(SETTINGS, descent=2, output_feedback=feedback)
        delta = quantize(weight, statistics, _scheme(name), settings).dequantize() - weight
        costs.append(float((statistics.gradient_moment @ delta @ statistics.second_moment)
                           .mul(delta).sum()))  # fmt: skip
    assert costs[1] < 0.85 * costs[0]


def test_types_in_one_call_are_those_of_single_calls(weight, statistics):
    schemes = [_scheme(name) for name in (*TYPES, "q4_k_m")]
    for settings in (SETTINGS, replace(SETTINGS, descent=1, output_feedback=0.5)):
        together = quantize_many(weight, statistics, schemes, settings)
        for scheme, found in zip(schemes, together, strict=True):
            alone = quantize(weight, statistics, scheme, settings)
            assert alone.scheme == found.scheme
            assert torch.equal(alone.codes, found.codes)
            assert all(torch.equal(alone.extras[key], found.extras[key]) for key in alone.extras)


@pytest.mark.parametrize("name", ["q5_1", "iq4_nl", "q4_k"])
def test_linears_side_by_side_get_what_each_gets_alone(monkeypatch, weight, statistics, name):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", 4)
    monkeypatch.setattr(coupled_descent, "DESCENT_ROWS", 4)
    settings = replace(SETTINGS, descent=1, output_feedback=0.7)
    weights = [weight, weight[:5].flip(0) + 0.01]
    gradient = statistics.gradient_moment
    each = [statistics, replace(statistics, gradient_moment=gradient[2:7, 2:7].contiguous())]
    together = quantize_each(weights, each, _scheme(name), settings)
    for found, own, known in zip(together, weights, each, strict=True):
        alone = quantize(own, known, _scheme(name), settings)
        # Products of other widths round otherwise: now and then a tie falls to the other code.
        assert (found.codes == alone.codes).double().mean() > 0.97
        assert found.dequantize().shape == own.shape
        assert pack_blocks(name, found.codes, found.extras).shape[0] == len(own)
        errors = [layer_error(own, one, known) for one in (found, alone)]
        assert errors[0] == pytest.approx(errors[1], rel=0.05)
    diagonal = replace(each[1], gradient_moment=each[1].gradient_moment.diagonal())
    mixed = quantize_each(weights, [each[0], diagonal], _scheme(name), settings)
    assert torch.equal(
        mixed[1].codes, quantize(weights[1], diagonal, _scheme(name), settings).codes
    )


def test_large_weights_are_worked_on_in_parts(monkeypatch, weight, statistics):
    settings = replace(SETTINGS, descent=1)
    whole = quantize(weight, statistics, _scheme("q4_k"), settings)
    monkeypatch.setattr(gguf_method, "_FEEDBACK_WEIGHTS", 2 * COLUMNS + 1)
    parts = quantize(weight, statistics, _scheme("q4_k"), settings)
    assert (parts.codes == whole.codes).double().mean() > 0.99
    ours, theirs = (layer_error(weight, found, statistics) for found in (parts, whole))
    assert ours == pytest.approx(theirs, rel=0.01)
    coupled_settings = replace(settings, output_feedback=0.7)  # rows are then not cut
    quantize(weight, statistics, _scheme("q4_k"), coupled_settings)


def test_an_importance_alone_rounds_to_the_nearest(weight, statistics):
    diagonal = replace(statistics, second_moment=statistics.second_moment.diagonal().diag())
    for name in TYPES:
        found = quantize(weight, diagonal, _scheme(name), SETTINGS).dequantize()
        importance = statistics.second_moment.diagonal()
        rounded = quantize_blocks(weight, _scheme(name), importance).dequantize()
        torch.testing.assert_close(found, rounded, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (replace(SETTINGS, descent=-1), "descent must not"),
        (replace(SETTINGS, damping=0.0), "damping must be above 0"),
        (replace(SETTINGS, output_feedback=2.0), "output_feedback must be"),
    ],
)
def test_settings_out_of_range_are_refused(weight, statistics, settings, message):
    with pytest.raises(InputError, match=message):
        quantize(weight, statistics, _scheme("q4_0"), settings)


def test_gradients_of_other_outputs_are_refused(weight, statistics):
    with pytest.raises(InputError, match="8 outputs, but got those of 9"):
        quantize(weight[:8], statistics, _scheme("q4_0"), replace(SETTINGS, output_feedback=0.7))


def test_held_out_errors_of_a_trained_model_fall(tmp_path):
    """Per linear, on text that no code was fitted to: rows of 256 and of 512."""
    loaded = load_model(Path(__file__).parents[2] / "examples" / "tiny-llama")
    stores = []
    for role in ("calibration", "evaluation"):
        text = draw((), loaded.tokenizer, role=role, sequences=8, sequence_length=128, seed=0)
        stores.append(open_store(loaded, text, root=tmp_path / role, gradient="none"))
        collect_statistics(loaded, text, stores[-1], gradient="none")
    for name in ("q4_0", "iq4_nl", "q3_k", "q4_k"):
        ratios = []
        for linear in loaded.linears:
            weight = loaded.tensor(f"{linear.name}.weight").float()
            known, unseen = (store.layer(linear) for store in stores)
            rounded = quantize_blocks(weight, _scheme(name), known.second_moment.diagonal())
            found = quantize(weight, known, _scheme(name), replace(SETTINGS, descent=2))
            ratios.append(layer_error(weight, found, unseen) / layer_error(weight, rounded, unseen))
        assert np.exp(np.mean(np.log(ratios))) < 0.5
        assert max(ratios) < 1
