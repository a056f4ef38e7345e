"""Coordinate descent against a slow float64 twin, one value at a time."""

from __future__ import annotations

import itertools

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.methods.column_state import ColumnState
from advisor.methods.descent import descend
from advisor.methods.descent_steps import Couplings
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

COLUMNS, ROWS, WIDTH = 96, 5, 24
SETTINGS = QuantizationSettings(scale_dtype="float32")


def _case(seed=0, columns=COLUMNS, rows=ROWS):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator)
    x = x @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=generator))
    moment = x.T @ x + 0.05 * (x**2).sum(0).mean() * torch.eye(columns)
    return torch.randn(columns, rows, generator=generator), moment


def _start(weight, bits=4, width=WIDTH):
    """Plain rounding with a symmetric grid, groups of consecutive columns."""
    groups = weight.view(-1, width, weight.shape[1])
    scales = groups.abs().amax(1) / (2 ** (bits - 1) - 1)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = (groups / scales[:, None]).round().clamp(low, high).view_as(weight)
    return ColumnState(steps, scales, torch.full_like(scales, low), torch.full_like(scales, high))


def _error(weight, quantized, moment):
    delta = (weight - quantized).double()
    return float((delta * (moment.double() @ delta)).sum())


def _oracle(weight, steps, scales, low, high, moment):
    """One pass, straight from the definition: the error is written out for every choice."""
    weight, moment = weight.double(), moment.double()
    steps, scales = steps.double().clone(), scales.double().clone()
    for row in range(weight.shape[1]):
        w = weight[:, row]

        def quantized(row=row):
            return steps[:, row] * scales[:, row].repeat_interleave(WIDTH)

        for group in range(scales.shape[0]):
            span = slice(group * WIDTH, (group + 1) * WIDTH)
            others = quantized()
            others[span] = 0
            q = torch.zeros_like(w)
            q[span] = steps[span, row]
            best = (q @ moment @ (w - others)) / (q @ moment @ q)
            scales[group, row] = best
            for column in range(span.start, span.stop):
                errors = []
                for code in range(low, high + 1):
                    steps[column, row] = code
                    delta = w - quantized()
                    errors.append(float(delta @ moment @ delta))
                steps[column, row] = low + int(torch.tensor(errors).argmin())
    return steps, scales


def test_one_pass_is_the_oracles():
    weight, moment = _case()
    state = _start(weight)
    steps, scales = _oracle(weight, state.steps, state.scales, -8, 7, moment)
    before = state.steps.clone()
    descend(weight, state, Couplings(moment, len(state.scales)), SETTINGS, 1)
    assert (state.steps != before).sum() > 10
    assert torch.equal(state.steps.double(), steps)
    torch.testing.assert_close(state.scales.double(), scales, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_pass_raises_the_error(dtype):
    weight, moment = _case(1, columns=160, rows=7)
    settings = QuantizationSettings(scale_dtype=dtype)
    state = _start(weight, bits=3, width=80)
    state.scales = settings.round_scales(state.scales)
    errors = [_error(weight, state.weight(), moment)]
    for _ in range(4):
        descend(weight, state, Couplings(moment, len(state.scales)), settings, 1)
        errors.append(_error(weight, state.weight(), moment))
        assert torch.equal(settings.round_scales(state.scales), state.scales)
    assert errors[1] < 0.8 * errors[0]
    for before, after in itertools.pairwise(errors):
        assert after <= before * (1 + 1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "gptq-int4-g32-sym", "gptq-int4-g32-asym", "gptq-int3-gch-sym",
        "gptq-int4-g32-sym-actorder", "gptq-int8-g32-asym",
    ],
)  # fmt: skip
@pytest.mark.parametrize("static", [False, True])
def test_gptq_is_improved_on_held_out_inputs(name, static):
    generator = torch.Generator().manual_seed(2)
    mix = torch.eye(96) + 0.3 * torch.randn(96, 96, generator=generator)
    x = torch.randn(2000, 96, generator=generator) @ mix
    fit, judge = x[:1000], x[1000:]
    weight = torch.randn(40, 96, generator=generator)
    statistics = LayerStatistics(1000, fit.T @ fit, fit.abs().amax(0), fit.abs().sum(0))
    scheme = parse_scheme(name)
    errors = []
    for passes in (0, 3):
        settings = QuantizationSettings(descent=passes, static_groups=static)
        found = quantize(weight, statistics, scheme, settings)
        errors.append(float(((found.dequantize() - weight) @ judge.T).square().sum()))
    assert errors[1] < 0.99 * errors[0]


def test_bad_settings():
    weight, statistics = torch.ones(4, 32), LayerStatistics(
        1, torch.eye(32), torch.ones(32), torch.ones(32)
    )  # fmt: skip
    for settings in (QuantizationSettings(descent=-1), QuantizationSettings(descent_damping=0)):
        with pytest.raises(InputError, match="descent"):
            quantize(weight, statistics, parse_scheme("gptq-int4-g32-sym"), settings)
