"""AWQ, SmoothQuant and the closed-form errors against explicit sums over the inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_quantizers as oracle
import torch
from quantizer_cases import COLUMNS, DEAD, FLOAT32, ROWS, STORED, TOKENS, double

from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.methods import errors, registry
from advisor.methods.awq import search_scales
from advisor.methods.settings import QuantizationSettings
from advisor.methods.smoothquant import smoothing_scales
from advisor.schemes import parse_scheme


@pytest.fixture(scope="module")
def inputs():
    return cases.make_inputs(0)


@pytest.fixture(scope="module")
def weight():
    return cases.make_weight(0)


@pytest.fixture(scope="module")
def statistics(inputs):
    return cases.make_statistics(inputs)


@pytest.mark.parametrize("form", ["int4-g16-asym", "int3-g16-sym", "int4-gch-asym"])
@pytest.mark.parametrize("seed", [0, 1])
def test_awq_scales(form, seed):
    inputs, weights = (
        cases.make_inputs(seed),
        [cases.make_weight(seed), cases.make_weight(seed + 10, rows=7)],
    )
    scheme = parse_scheme(f"awq-{form}")
    statistics = cases.make_statistics(inputs)
    alphas = np.linspace(0, 1, FLOAT32.scale_steps)
    losses = oracle.awq_search(
        [double(weight) for weight in weights], double(inputs), cases.grid_of(scheme),
        cases.width_of(scheme), alphas,
    )  # fmt: skip
    assert not cases.undecided(losses)
    best = int(np.argmin(losses))
    assert best > 0, "a case where scaling does not help tests nothing"
    expected = oracle.awq_scales(np.abs(double(inputs)).mean(0), alphas[best])
    found = search_scales(weights, statistics, scheme, STORED[scheme.symmetric])
    np.testing.assert_allclose(double(found), expected, rtol=1e-5)
    assert found[DEAD] == 1.0


@pytest.mark.parametrize("form", ["int4-g16-asym", "int3-g16-sym"])
def test_awq_with_clip_search(weight, inputs, form):
    scheme = parse_scheme(f"awq-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse")
    scales = search_scales([weight], cases.make_statistics(inputs), scheme, settings)
    folded, statistics = weight * scales, scale_inputs(cases.make_statistics(inputs), scales)
    found = registry.quantize(folded, statistics, scheme, settings)
    factors = cases.clip_factors(settings, scheme)
    scaled = double(inputs) / double(scales)
    expected = oracle.awq_clip(double(folded), scaled, cases.grid_of(scheme), 16, factors)
    assert not any(
        cases.undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0)
    )
    plain = oracle.rtn(double(folded), cases.grid_of(scheme), 16)
    assert (expected.scales < plain.scales).any()
    cases.compare(found, expected, scheme)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_smoothquant_scales(inputs, alpha):
    weights = [cases.make_weight(0), cases.make_weight(11, rows=7)]
    for weight in weights:
        weight[:, 2] = 0.0
    settings = QuantizationSettings(smoothing=alpha)
    found = smoothing_scales(weights, cases.make_statistics(inputs), settings)
    expected = oracle.smoothquant_scales([double(w) for w in weights], double(inputs), alpha)
    np.testing.assert_allclose(double(found), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["rtn-int3-g16-sym", "rtn-int8-gch-sym"])
def test_layer_error(weight, inputs, statistics, name):
    found = registry.quantize(weight, None, parse_scheme(name), FLOAT32)
    delta = double(found.dequantize()) - double(weight)
    expected = oracle.output_error(delta, double(inputs)) / TOKENS
    assert errors.layer_error(weight, found, statistics) == pytest.approx(expected, rel=1e-4)
    rows = [oracle.output_error(delta[row : row + 1], double(inputs)) / TOKENS for row in range(3)]
    assert errors.row_errors(weight, found, statistics)[:3].tolist() == pytest.approx(
        rows, rel=1e-4
    )


def test_kl_score(weight, inputs):
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(ROWS, ROWS))
    gradients = torch.tensor(generator.normal(size=(70, ROWS)) @ mixing, dtype=torch.float32)
    delta = torch.tensor(0.01 * generator.normal(size=(ROWS, COLUMNS)), dtype=torch.float32)
    found = errors.kl_score(delta, cases.make_statistics(inputs, gradients))
    expected = oracle.kl_second_order(double(delta), double(inputs), double(gradients))
    assert found == pytest.approx(expected, rel=1e-4)
    # A diagonal gradient moment stands for gradients whose components are uncorrelated.
    full = cases.make_statistics(inputs, gradients)
    diagonal = LayerStatistics(
        full.tokens, full.second_moment, full.absolute_maximum, full.absolute_sum,
        full.gradient_tokens, full.gradient_moment.diagonal(),
    )  # fmt: skip
    apart = sum(
        oracle.kl_second_order(
            double(delta)[row : row + 1], double(inputs), double(gradients)[:, row : row + 1]
        )
        for row in range(ROWS)
    )
    assert errors.kl_score(delta, diagonal) == pytest.approx(apart, rel=1e-4)


def test_kl_score_is_the_divergence_in_nats(inputs):
    """Of a softmax whose weight is zero: gradients do not depend on inputs, so it is exact."""
    generator = np.random.default_rng(6)
    logits = generator.normal(size=ROWS)
    p = np.exp(logits) / np.exp(logits).sum()
    # p has gradients e_label - p with labels drawn from p: their mean outer product is known.
    fisher = np.diag(p) - np.outer(p, p)
    delta = 2e-3 * generator.normal(size=(ROWS, COLUMNS))
    divergence = 0.0
    for token in double(inputs):
        changed = logits + delta @ token
        log_q = changed - math.log(np.exp(changed).sum())
        divergence += float((p * (np.log(p) - log_q)).sum()) / TOKENS
    base = cases.make_statistics(inputs)
    statistics = LayerStatistics(
        base.tokens, base.second_moment, base.absolute_maximum, base.absolute_sum,
        9, torch.tensor(9 * fisher, dtype=torch.float32),
    )  # fmt: skip
    found = errors.kl_score(torch.tensor(delta, dtype=torch.float32), statistics)
    assert divergence > 1e-6
    assert found == pytest.approx(divergence, rel=0.02)
