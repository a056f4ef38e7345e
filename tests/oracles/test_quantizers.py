"""Every integer quantizer against its textbook twin in float64."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.methods import errors, registry
from advisor.methods.awq import search_scales
from advisor.methods.settings import QuantizationSettings
from advisor.methods.smoothquant import smoothing_scales
from advisor.schemes import parse_scheme

TIE = 1e-4
"""Steps of the grid from a tie within which float32 may round the other way."""
FLOAT32 = QuantizationSettings(scale_dtype="float32")
STORED = {True: QuantizationSettings(), False: FLOAT32}
"""Settings by symmetry. A symmetric scale puts the largest magnitude of a group at a tie, half a
step outside the grid on the positive side; with a scale rounded to bfloat16 it is none, and codes
are decided. An asymmetric grid has no such ties."""
ROWS, COLUMNS, TOKENS, DEAD = 10, 48, 160, 29


def _load(name: str):
    path = Path(__file__).with_name(f"{name}.py")
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


oracle = _load("reference_quantizers")


def _inputs(seed: int) -> torch.Tensor:
    """Correlated inputs of very different magnitudes, one channel never active; float32."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(COLUMNS, COLUMNS)) / math.sqrt(COLUMNS) + np.eye(COLUMNS)
    values = generator.normal(size=(TOKENS, COLUMNS)) @ mixing
    values *= np.exp(generator.normal(size=COLUMNS))
    values[:, DEAD] = 0.0
    return torch.tensor(values, dtype=torch.float32)


def _weight(seed: int, rows: int = ROWS) -> torch.Tensor:
    """Heavy-tailed weights with two large outliers and a group of zeros."""
    generator = np.random.default_rng(100 + seed)
    weight = 0.05 * generator.standard_t(4, size=(rows, COLUMNS))
    weight[1, 5], weight[4, 40] = 1.7, -2.3
    weight[3, :16] = 0.0
    # All of one sign: an asymmetric grid must still hold zero.
    weight[6, 16:32] = np.abs(weight[6, 16:32]) + 0.1
    return torch.tensor(weight, dtype=torch.float32)


def _statistics(inputs: torch.Tensor, gradients: torch.Tensor | None = None) -> LayerStatistics:
    exact = inputs.double()
    moment = None if gradients is None else (gradients.double().T @ gradients.double()).float()
    return LayerStatistics(
        tokens=len(inputs),
        second_moment=(exact.T @ exact).float(),
        absolute_maximum=inputs.abs().amax(0),
        absolute_sum=exact.abs().sum(0).float(),
        gradient_tokens=0 if gradients is None else len(gradients),
        gradient_moment=moment,
    )


@pytest.fixture(scope="module")
def inputs():
    return _inputs(0)


@pytest.fixture(scope="module")
def weight():
    return _weight(0)


@pytest.fixture(scope="module")
def statistics(inputs):
    return _statistics(inputs)


def _double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def _width(scheme) -> int:
    return COLUMNS if scheme.granularity == "channel" else scheme.group_size


def _grid(scheme, settings=None):
    settings = settings or STORED[scheme.symmetric]
    return oracle.Grid(int(scheme.bits), bool(scheme.symmetric), settings.scale_dtype)


def _zeros(found, scheme) -> np.ndarray:
    if found.zero_points is None:
        assert scheme.symmetric
        return np.full(tuple(found.scales.shape), 2 ** (int(scheme.bits) - 1))
    return found.zero_points.numpy().astype(int)


def _compare(found, expected, scheme, *, in_order=None, ties: int = 2) -> None:
    """Codes equal but for ties; scales and zero points equal where no tie came before.

    With ``in_order``, columns depend on earlier ones of the same row (GPTQ): after a value that
    is at a tie, the rest of that row is not compared, so such rows are counted and few.
    """
    codes = found.codes.numpy().astype(int)
    assert codes.shape == expected.codes.shape
    index = found.group_index
    groups = expected.group_of if index is None else index.numpy()
    np.testing.assert_array_equal(groups, expected.group_of)
    order = list(range(codes.shape[1])) if in_order is None else in_order
    zeros, allowed = _zeros(found, scheme), 0
    for row in range(codes.shape[0]):
        for column in order:
            group = expected.group_of[column]
            assert float(found.scales[row, group]) == pytest.approx(
                expected.scales[row, group], rel=3e-6
            ), f"scale of row {row}, group {group}"
            assert zeros[row, group] == expected.zeros[row, group], f"zero point {row}, {group}"
            if codes[row, column] == expected.codes[row, column]:
                continue
            assert abs(codes[row, column] - expected.codes[row, column]) == 1
            assert expected.margins[row, column] < TIE, f"code of row {row}, column {column}"
            allowed += 1
            if in_order is not None:
                break
    assert allowed <= ties


def _same_error(found, expected, weight, inputs, rel: float) -> None:
    """The quantized weights are equally good on the raw inputs."""
    ours = ((_double(inputs) @ (_double(found.dequantize()) - _double(weight)).T) ** 2).sum()
    theirs = ((_double(inputs) @ (expected.dequantize() - _double(weight)).T) ** 2).sum()
    assert ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("form", ["gch-sym", "gch-asym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn(weight, bits, form):
    scheme = parse_scheme(f"rtn-int{bits}-{form}")
    found = registry.quantize(weight, None, scheme, FLOAT32)
    expected = oracle.rtn(_double(weight), _grid(scheme, FLOAT32), _width(scheme))
    # The largest of each group is at a tie (see STORED): either code is half a step off.
    _compare(found, expected, scheme, ties=expected.scales.size if scheme.symmetric else 0)
    ours = (found.dequantize().double() - weight.double()).square().sum()
    theirs = np.square(expected.dequantize() - _double(weight)).sum()
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["g16-sym", "g16-asym"])
def test_rtn_chooses_codes_for_the_scales_as_stored(weight, scale_dtype, form):
    settings = QuantizationSettings(scale_dtype=scale_dtype)
    scheme = parse_scheme(f"rtn-int4-{form}")
    found = registry.quantize(weight, None, scheme, settings)
    expected = oracle.rtn(_double(weight), _grid(scheme, settings), 16)
    np.testing.assert_array_equal(found.scales.double().numpy(), expected.scales)
    _compare(found, expected, scheme, ties=0)


def _undecided(losses: dict) -> bool:
    """Whether the two best clipped ranges of a group are equally good within float32."""
    ranked = sorted(losses)
    return len(ranked) > 1 and ranked[1] - ranked[0] <= 1e-5 * max(ranked[0], 1e-30)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["g16-sym", "g16-asym", "gch-sym"])
def test_rtn_with_clip_search(weight, statistics, weighted, form):
    scheme = parse_scheme(f"rtn-int3-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse")
    found = registry.quantize(weight, statistics if weighted else None, scheme, settings)
    factors = oracle.clip_factors(settings.clip_steps, settings.clip_shrink)
    importance = np.diag(_double(statistics.second_moment)) if weighted else None
    expected = oracle.rtn(
        _double(weight), _grid(scheme), _width(scheme), factors=factors, importance=importance
    )
    assert not any(_undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0))
    _compare(found, expected, scheme)


@pytest.mark.parametrize("form", ["gch-sym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(weight, inputs, statistics, bits, form):
    scheme = parse_scheme(f"gptq-int{bits}-{form}")
    found = registry.quantize(weight, statistics, scheme, STORED[scheme.symmetric])
    expected = oracle.gptq(
        _double(weight), _double(statistics.second_moment), _grid(scheme), _width(scheme)
    )
    _compare(found, expected, scheme, in_order=range(COLUMNS))
    _same_error(found, expected, weight, inputs, 0.02)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_gptq_damps_by_a_share_of_the_mean_diagonal(weight, statistics, damping):
    scheme = parse_scheme("gptq-int4-g16-asym")
    settings = QuantizationSettings(scale_dtype="float32", damping=damping)
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = _double(statistics.second_moment)
    expected = oracle.gptq(_double(weight), moment, _grid(scheme), 16, damping=damping)
    _compare(found, expected, scheme, in_order=range(COLUMNS))


@pytest.mark.parametrize("column_block", [8, 24, 32])
def test_gptq_groups_see_all_updates_whatever_the_block(weight, statistics, column_block):
    scheme = parse_scheme("gptq-int4-g16-sym")
    settings = QuantizationSettings(column_block=column_block)
    found = registry.quantize(weight, statistics, scheme, settings)
    expected = oracle.gptq(_double(weight), _double(statistics.second_moment), _grid(scheme), 16)
    _compare(found, expected, scheme, in_order=range(COLUMNS))


@pytest.mark.parametrize("form", ["gch-sym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("static", [False, True])
def test_gptq_in_activation_order(weight, inputs, statistics, form, static):
    scheme = parse_scheme(f"gptq-int4-{form}" + ("" if static else "-actorder"))
    settings = replace(STORED[scheme.symmetric], static_groups=static)
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = _double(statistics.second_moment)
    order = oracle.activation_order(moment)
    assert order[-1] == DEAD
    expected = oracle.gptq(
        _double(weight), moment, _grid(scheme), _width(scheme), order=order, static=static
    )
    _compare(found, expected, scheme, in_order=order)
    _same_error(found, expected, weight, inputs, 0.02)


@pytest.mark.parametrize("form", ["g16-sym", "g16-asym-actorder"])
def test_gptq_with_clip_search(weight, statistics, form):
    scheme = parse_scheme(f"gptq-int3-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse")
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = _double(statistics.second_moment)
    order = oracle.activation_order(moment) if scheme.activation_order else range(COLUMNS)
    factors = oracle.clip_factors(settings.clip_steps, settings.clip_shrink)
    expected = oracle.gptq(_double(weight), moment, _grid(scheme), 16, order=order, factors=factors)
    assert not any(_undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0))
    _compare(found, expected, scheme, in_order=order)


def test_gptq_of_many_schemes_at_once(weight, statistics):
    names = [
        "gptq-int2-g16-asym", "gptq-int8-gch-sym", "gptq-int4-g8-sym", "gptq-int3-g16-asym",
        "gptq-int4-g16-sym-actorder", "gptq-int5-g24-sym", "rtn-int4-g16-sym", "gptq-int6-g48-asym",
    ]  # fmt: skip
    schemes = [parse_scheme(name) for name in names]
    moment = _double(statistics.second_moment)
    by_activation = oracle.activation_order(moment)
    found = registry.quantize_many(weight, statistics, schemes, QuantizationSettings())
    for scheme, result in zip(schemes, found, strict=True):
        assert result.scheme == scheme
        grid = _grid(scheme, QuantizationSettings())
        if scheme.method == "rtn":
            _compare(result, oracle.rtn(_double(weight), grid, 16), scheme)
            continue
        order = by_activation if scheme.activation_order else list(range(COLUMNS))
        expected = oracle.gptq(_double(weight), moment, grid, _width(scheme), order=order)
        _compare(result, expected, scheme, in_order=order)


@pytest.mark.parametrize("form", ["int4-g16-asym", "int3-g16-sym", "int4-gch-asym"])
@pytest.mark.parametrize("seed", [0, 1])
def test_awq_scales(form, seed):
    inputs, weights = _inputs(seed), [_weight(seed), _weight(seed + 10, rows=7)]
    scheme = parse_scheme(f"awq-{form}")
    statistics = _statistics(inputs)
    alphas = np.linspace(0, 1, FLOAT32.scale_steps)
    losses = oracle.awq_search(
        [_double(weight) for weight in weights], _double(inputs), _grid(scheme),
        _width(scheme), alphas,
    )  # fmt: skip
    assert not _undecided(losses)
    best = int(np.argmin(losses))
    assert best > 0, "a case where scaling does not help tests nothing"
    expected = oracle.awq_scales(np.abs(_double(inputs)).mean(0), alphas[best])
    found = search_scales(weights, statistics, scheme, STORED[scheme.symmetric])
    np.testing.assert_allclose(_double(found), expected, rtol=1e-5)
    assert found[DEAD] == 1.0


@pytest.mark.parametrize("form", ["int4-g16-asym", "int3-g16-sym"])
def test_awq_with_clip_search(weight, inputs, form):
    scheme = parse_scheme(f"awq-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse")
    scales = search_scales([weight], _statistics(inputs), scheme, settings)
    folded, statistics = weight * scales, scale_inputs(_statistics(inputs), scales)
    found = registry.quantize(folded, statistics, scheme, settings)
    factors = oracle.clip_factors(settings.clip_steps, settings.clip_shrink)
    scaled = _double(inputs) / _double(scales)
    expected = oracle.awq_clip(_double(folded), scaled, _grid(scheme), 16, factors)
    assert not any(_undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0))
    plain = oracle.rtn(_double(folded), _grid(scheme), 16)
    assert (expected.scales < plain.scales).any()
    _compare(found, expected, scheme)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_smoothquant_scales(inputs, alpha):
    weights = [_weight(0), _weight(11, rows=7)]
    for weight in weights:
        weight[:, 2] = 0.0
    settings = QuantizationSettings(smoothing=alpha)
    found = smoothing_scales(weights, _statistics(inputs), settings)
    expected = oracle.smoothquant_scales([_double(w) for w in weights], _double(inputs), alpha)
    np.testing.assert_allclose(_double(found), expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["rtn-int3-g16-sym", "rtn-int8-gch-sym"])
def test_layer_error(weight, inputs, statistics, name):
    found = registry.quantize(weight, None, parse_scheme(name), FLOAT32)
    delta = _double(found.dequantize()) - _double(weight)
    expected = oracle.output_error(delta, _double(inputs)) / TOKENS
    assert errors.layer_error(weight, found, statistics) == pytest.approx(expected, rel=1e-4)
    rows = [oracle.output_error(delta[row : row + 1], _double(inputs)) / TOKENS for row in range(3)]
    assert errors.row_errors(weight, found, statistics)[:3].tolist() == pytest.approx(
        rows, rel=1e-4
    )


def test_kl_score(weight, inputs):
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(ROWS, ROWS))
    gradients = torch.tensor(generator.normal(size=(70, ROWS)) @ mixing, dtype=torch.float32)
    delta = torch.tensor(0.01 * generator.normal(size=(ROWS, COLUMNS)), dtype=torch.float32)
    found = errors.kl_score(delta, _statistics(inputs, gradients))
    expected = oracle.kl_second_order(_double(delta), _double(inputs), _double(gradients))
    assert found == pytest.approx(expected, rel=1e-4)
    # A diagonal gradient moment stands for gradients whose components are uncorrelated.
    full = _statistics(inputs, gradients)
    diagonal = LayerStatistics(
        full.tokens, full.second_moment, full.absolute_maximum, full.absolute_sum,
        full.gradient_tokens, full.gradient_moment.diagonal(),
    )  # fmt: skip
    apart = sum(
        oracle.kl_second_order(
            _double(delta)[row : row + 1], _double(inputs), _double(gradients)[:, row : row + 1]
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
    for token in _double(inputs):
        changed = logits + delta @ token
        log_q = changed - math.log(np.exp(changed).sum())
        divergence += float((p * (np.log(p) - log_q)).sum()) / TOKENS
    base = _statistics(inputs)
    statistics = LayerStatistics(
        base.tokens, base.second_moment, base.absolute_maximum, base.absolute_sum,
        9, torch.tensor(9 * fisher, dtype=torch.float32),
    )  # fmt: skip
    found = errors.kl_score(torch.tensor(delta, dtype=torch.float32), statistics)
    assert divergence > 1e-6
    assert found == pytest.approx(divergence, rel=0.02)
