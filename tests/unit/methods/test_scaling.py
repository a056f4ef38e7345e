from __future__ import annotations

import dataclasses

import pytest
import torch

from advisor.errors import InputError
from advisor.methods import awq, registry, smoothquant
from advisor.methods.errors import kl_score, layer_error, row_errors
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

SETTINGS = QuantizationSettings()
CLIPPED = QuantizationSettings(clip="mse")
NAMES = ["awq-int4-g64-asym", "awq-int3-g48-sym", "awq-int4-gch-asym"]


def scaled(statistics, scales):
    return dataclasses.replace(
        statistics,
        second_moment=statistics.second_moment / scales / scales.unsqueeze(1),
        absolute_maximum=statistics.absolute_maximum / scales,
        absolute_sum=statistics.absolute_sum / scales,
    )


def rounding_error(weight, statistics, scheme):
    plain = dataclasses.replace(scheme, method="rtn")
    return layer_error(weight, registry.quantize(weight, None, plain, SETTINGS), statistics)


@pytest.mark.parametrize("name", NAMES)
def test_awq_error_is_below_that_of_rounding(weight, statistics, name):
    scheme = parse_scheme(name)
    scales = awq.search_scales([weight[:30], weight[30:]], statistics, scheme, SETTINGS)
    folded = scaled(statistics, scales)
    found = awq.quantize(weight * scales, folded, scheme, SETTINGS)
    error = layer_error(weight * scales, found, folded)
    assert error == pytest.approx(
        layer_error(weight, found.dequantize() / scales, statistics), rel=1e-4
    )
    assert error < 0.9 * rounding_error(weight, statistics, scheme)


@pytest.mark.parametrize("name", NAMES)
def test_awq_clipping_never_makes_a_row_worse(weight, statistics, name):
    scheme = parse_scheme(name)
    plain = row_errors(weight, awq.quantize(weight, statistics, scheme, SETTINGS), statistics)
    clipped = row_errors(weight, awq.quantize(weight, statistics, scheme, CLIPPED), statistics)
    assert bool((clipped <= plain).all())
    assert clipped.sum() < 0.95 * plain.sum()


def test_awq_best_exponent_is_found_by_trying_all(weight, statistics):
    scheme = parse_scheme("awq-int4-g64-sym")
    scales = awq.search_scales([weight], statistics, scheme, SETTINGS)
    magnitude = statistics.absolute_sum / statistics.tokens
    errors = []
    for alpha in torch.linspace(0, 1, 20).tolist():
        trial = magnitude**alpha
        trial = trial / (trial.max() * trial.min()).sqrt()
        found = awq.quantize(weight * trial, None, scheme, SETTINGS).dequantize() / trial
        errors.append(layer_error(weight, found, statistics))
    best = float(torch.linspace(0, 1, 20)[errors.index(min(errors))])
    expected = magnitude**best
    torch.testing.assert_close(scales, expected / (expected.max() * expected.min()).sqrt())


def test_awq_leaves_dead_inputs_alone(weight, inputs, make_statistics):
    live = inputs.clone()
    live[:, 5] = 0.0
    scales = awq.search_scales([weight], make_statistics(live), parse_scheme(NAMES[0]), SETTINGS)
    assert scales[5] == 1.0
    assert bool(torch.isfinite(scales).all() and (scales > 0).all())


def test_smoothquant_equation_4(weight, statistics):
    settings = QuantizationSettings(smoothing=0.75)
    scales = smoothquant.smoothing_scales([weight[:30], weight[30:]], statistics, settings)
    expected = statistics.absolute_maximum**0.75 / weight.abs().amax(0) ** 0.25
    torch.testing.assert_close(scales, expected)


def test_smoothquant_alpha_half_balances_inputs_and_weights(weight, statistics):
    scales = smoothquant.smoothing_scales([weight], statistics, SETTINGS)
    torch.testing.assert_close(
        statistics.absolute_maximum / scales, (weight * scales).abs().amax(0)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, s: awq.search_scales([], s, parse_scheme(NAMES[0]), SETTINGS), "at least one"),
        (
            lambda w, s: awq.search_scales(
                [w], s, parse_scheme(NAMES[0]), QuantizationSettings(scale_steps=0)
            ),
            "scale_steps must be at least 1, but got 0",
        ),
        (lambda w, s: awq.quantize(w, None, parse_scheme(NAMES[0]), CLIPPED), "got none"),
        (
            lambda w, s: smoothquant.smoothing_scales([w], s, QuantizationSettings(smoothing=2)),
            r"smoothing must be in \[0, 1\], but got 2",
        ),
    ],
)
def test_bad_requests_are_refused(weight, statistics, call, message):
    with pytest.raises(InputError, match=message):
        call(weight, statistics)


def test_layer_error_is_the_mean_squared_change_of_the_outputs(weight, inputs, statistics):
    changed = weight + 0.01 * torch.randn(80, 192, generator=torch.Generator().manual_seed(2))
    outputs = inputs @ (changed - weight).t()
    expected = outputs.square().sum(dim=1).mean()
    assert layer_error(weight, changed, statistics) == pytest.approx(float(expected), rel=1e-4)
    assert layer_error(weight.bfloat16(), weight.bfloat16(), statistics) == 0.0


def test_kl_score_is_half_the_kronecker_form(inputs, make_statistics):
    generator = torch.Generator().manual_seed(4)
    gradients = torch.randn(300, 80, generator=generator) * 0.1
    full = make_statistics(inputs, gradients)
    delta = 0.01 * torch.randn(80, 192, generator=generator)
    # E over independent tokens and gradients of (gᵀ ΔW x)² is the form that the score halves.
    projected = gradients @ delta @ inputs.t()
    assert kl_score(delta, full) == pytest.approx(float(projected.square().mean()) / 2, rel=1e-3)
    diagonal = dataclasses.replace(full, gradient_moment=full.gradient_moment.diagonal())
    masked = dataclasses.replace(full, gradient_moment=full.gradient_moment.diagonal().diag())
    assert kl_score(delta, diagonal) == pytest.approx(kl_score(delta, masked), rel=1e-4)


def test_kl_score_needs_gradients(statistics):
    with pytest.raises(InputError, match="gradients=True"):
        kl_score(torch.zeros(80, 192), statistics)
