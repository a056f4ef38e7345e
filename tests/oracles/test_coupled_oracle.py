"""GPTQ with feedback among outputs against a slow float64 twin, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_quantizers as oracle
import torch
from quantizer_cases import COLUMNS, STORED, double

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.methods import coupled_descent, wave_front
from advisor.methods.outputs import output_metric
from advisor.methods.registry import quantize, quantize_each
from advisor.schemes import parse_scheme

ROWS, BLOCK = 22, 4
"""Six blocks of rows, the last one not full."""
FEEDBACK, DAMPING = 0.9, 0.1


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(wave_front, "ROW_BLOCK", BLOCK)
    monkeypatch.setattr(coupled_descent, "DESCENT_ROWS", 8)


@pytest.fixture(scope="module")
def gradients():
    generator = np.random.default_rng(5)
    mixing = generator.normal(size=(ROWS, 3)) @ generator.normal(size=(3, ROWS))
    values = generator.normal(size=(400, ROWS)) @ (mixing + 0.5 * np.eye(ROWS))
    return torch.tensor(values * np.exp(generator.normal(size=ROWS)), dtype=torch.float32)


@pytest.fixture(scope="module")
def weight():
    return cases.make_weight(1, ROWS)


@pytest.fixture(scope="module")
def inputs():
    return cases.make_inputs(1)


@pytest.fixture(scope="module")
def statistics(inputs, gradients):
    return cases.make_statistics(inputs, gradients)


def _metric(statistics):
    """G of the docstring of ``output_metric``, in float64, entry by entry."""
    moment = double(statistics.gradient_moment)
    tokens = min(statistics.tokens, statistics.gradient_tokens)
    share = FEEDBACK * tokens / (tokens + len(moment))
    mean = np.mean(np.diag(moment))
    metric = share * moment
    for row in range(len(moment)):
        metric[row, row] = moment[row, row] + DAMPING * mean
    return metric


def _oracle(weight, statistics, grid, width, *, order=None, static=False):
    """Block of rows after block of rows: GPTQ for weights that make up for the blocks before.

    A block is every so many-th row.
    """
    weight, metric = double(weight), _metric(statistics)
    moment = double(statistics.second_moment)
    known = oracle.rtn(weight, grid, width) if static else None
    result = oracle.Reference.empty(ROWS, COLUMNS, width)
    change = np.zeros_like(weight)
    blocks = -(-ROWS // BLOCK)
    for first in range(blocks):
        rows = np.arange(first, ROWS, blocks)
        above = np.array([row for row in range(ROWS) if row % blocks < first], dtype=int)
        pull = metric[np.ix_(rows, above)] @ change[above]
        target = weight[rows] - np.linalg.inv(metric[np.ix_(rows, rows)]) @ pull
        scales = None if known is None else (known.scales[rows], known.zeros[rows])
        part = oracle.gptq(target, moment, grid, width, order=order, static=static, scales=scales)
        change[rows] = part.dequantize() - weight[rows]
        for name in ("codes", "margins", "scales", "zeros"):
            getattr(result, name)[rows] = getattr(part, name)
        result.group_of = part.group_of
    return result


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("form", ["g16-sym", "g16-asym", "g8-asym", "gch-asym", "g16-sym-actorder"])
def test_codes_are_the_oracles(weight, statistics, form, static):
    scheme = parse_scheme(f"gptq-int4-{form}")
    settings = replace(
        STORED[scheme.symmetric],
        output_feedback=FEEDBACK, output_damping=DAMPING, static_groups=static,
    )  # fmt: skip
    found = quantize(weight, statistics, scheme, settings)
    # A row's only scale, like those of static groups, is chosen before the rows above are known.
    before = (static and not scheme.activation_order) or scheme.granularity == "channel"
    order = list(range(COLUMNS)) if before else None
    if scheme.activation_order or static:
        order = oracle.activation_order(double(statistics.second_moment))
    expected = _oracle(
        weight, statistics, cases.grid_of(scheme), cases.width_of(scheme),
        order=order, static=before,
    )  # fmt: skip
    # A code at a tie changes the rows below, too: nearly all codes are equal, and the error is.
    same = found.codes.numpy() == expected.codes
    assert same.mean() > 0.97
    first = slice(None, None, -(-ROWS // BLOCK))
    np.testing.assert_allclose(found.scales[first].numpy(), expected.scales[first], rtol=3e-6)
    metric, moment = _metric(statistics), double(statistics.second_moment)

    def cost(values):
        delta = values - double(weight)
        return np.trace(metric @ delta @ moment @ delta.T)

    assert cost(double(found.dequantize())) == pytest.approx(cost(expected.dequantize()), rel=0.02)


def _cost(delta, inputs, gradients):
    """Mean of (gᵀ ΔW x)² over all pairs."""
    products = gradients.double() @ delta.double() @ inputs.double().T
    return float(products.square().mean())


@pytest.mark.parametrize("form", ["int4-g16-sym", "int4-g16-asym", "int3-gch-sym", "int8-g8-asym"])
@pytest.mark.parametrize("descent", [0, 3])
@pytest.mark.parametrize("static", [False, True])
def test_outputs_that_act_together_make_up_for_each_other(form, descent, static):
    generator = torch.Generator().manual_seed(3)
    mix = torch.eye(COLUMNS) + 0.3 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = torch.randn(2000, COLUMNS, generator=generator) @ mix
    joint = torch.randn(4, ROWS, generator=generator)
    gradients = torch.randn(2000, 4, generator=generator) @ joint
    gradients = gradients + 0.3 * torch.randn(2000, ROWS, generator=generator)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    statistics = cases.make_statistics(inputs[:1000], gradients[:1000])
    scheme = parse_scheme(f"gptq-{form}")
    costs = []
    for feedback in (0.0, FEEDBACK):
        settings = replace(
            STORED[scheme.symmetric],
            output_feedback=feedback, descent=descent, static_groups=static,
        )  # fmt: skip
        delta = quantize(weight, statistics, scheme, settings).dequantize() - weight
        costs.append(_cost(delta, inputs[1000:], gradients[1000:]))
    assert costs[1] < 0.85 * costs[0]


def test_independent_outputs_change_nothing(weight, inputs):
    gradients = torch.eye(ROWS).repeat(20, 1) * torch.arange(1.0, ROWS + 1)
    statistics = cases.make_statistics(inputs, gradients)
    scheme = parse_scheme("gptq-int4-g16-asym")
    plain = quantize(weight, statistics, scheme, replace(STORED[False], static_groups=True))
    fed = quantize(
        weight, statistics, scheme, replace(STORED[False], static_groups=True, output_feedback=1.0)
    )
    assert (plain.codes == fed.codes).float().mean() > 0.995
    assert torch.equal(plain.scales, fed.scales)


def test_few_tokens_are_hardly_believed(statistics):
    settings = replace(STORED[True], output_feedback=1.0)
    many = output_metric(replace(statistics, tokens=10**6, gradient_tokens=10**6), settings, ROWS)
    few = output_metric(replace(statistics, tokens=2, gradient_tokens=10**6), settings, ROWS)
    assert torch.equal(many.diagonal(), few.diagonal())
    off = ~torch.eye(ROWS, dtype=torch.bool)
    torch.testing.assert_close(few[off], many[off] * (2 / (2 + ROWS)), rtol=1e-4, atol=0)


@pytest.mark.parametrize("form", ["g16-sym", "g8-asym", "gch-asym", "g16-sym-actorder"])
@pytest.mark.parametrize("static", [False, True])
def test_linears_side_by_side_get_what_each_gets_alone(weight, inputs, gradients, form, static):
    heights = (ROWS, 10, 7)  # three turns in the descent, two, and one
    weights = [cases.make_weight(seed, rows) for seed, rows in enumerate(heights)]
    each = [cases.make_statistics(inputs, gradients[:, :rows] + rows) for rows in heights]
    scheme = parse_scheme(f"gptq-int4-{form}")
    settings = replace(
        STORED[scheme.symmetric], output_feedback=FEEDBACK, descent=2, static_groups=static
    )
    together = quantize_each(weights, each, scheme, settings)
    for found, own, statistics in zip(together, weights, each, strict=True):
        alone = quantize(own, statistics, scheme, settings)
        # Products of other widths round otherwise: now and then a tie falls to the other code.
        assert (found.codes == alone.codes).float().mean() > 0.97
        assert found.dequantize().shape == own.shape
        error = [float((w.dequantize() - own).square().sum()) for w in (found, alone)]
        assert error[0] == pytest.approx(error[1], rel=0.05)
    diagonal = replace(each[1], gradient_moment=each[1].gradient_moment.diagonal())
    mixed = quantize_each(weights[:2], [each[0], diagonal], scheme, settings)
    assert torch.equal(mixed[1].codes, quantize(weights[1], diagonal, scheme, settings).codes)


def test_without_a_whole_moment_rows_are_independent(weight, statistics):
    scheme = parse_scheme("gptq-int4-g16-asym")
    plain = quantize(weight, statistics, scheme, STORED[False])
    fed = replace(STORED[False], output_feedback=0.9)
    diagonal = replace(statistics, gradient_moment=statistics.gradient_moment.diagonal())
    for known in (diagonal, replace(statistics, gradient_moment=None)):
        assert torch.equal(plain.codes, quantize(weight, known, scheme, fed).codes)
    assert not torch.equal(plain.codes, quantize(weight, statistics, scheme, fed).codes)


def test_gradients_of_other_outputs_are_refused(weight, statistics):
    scheme = parse_scheme("gptq-int4-g16-asym")
    with pytest.raises(InputError, match="44 outputs, but got those of 22"):
        quantize(
            torch.cat([weight, weight]),
            statistics,
            scheme,
            replace(STORED[False], output_feedback=1),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"output_feedback": 1.5}, "output_feedback must be"), ({"output_damping": 0.0}, "above 0")],
)
def test_settings_out_of_range_are_refused(weight, statistics, change, message):
    with pytest.raises(InputError, match=message):
        quantize(
            weight, statistics, parse_scheme("gptq-int4-g16-sym"), replace(STORED[True], **change)
        )


def test_a_gradient_of_zeros_does_no_harm(weight, statistics):
    nothing = replace(statistics, gradient_moment=torch.zeros(ROWS, ROWS))
    settings = replace(STORED[False], output_feedback=0.9, descent=1)
    found = quantize(weight, nothing, parse_scheme("gptq-int4-g16-asym"), settings)
    assert bool(found.dequantize().isfinite().all())


def test_statistics_are_not_changed(weight, inputs, gradients):
    statistics: LayerStatistics = cases.make_statistics(inputs, gradients)
    before = statistics.gradient_moment.clone()
    settings = replace(STORED[False], output_feedback=0.9, descent=1)
    quantize(weight, statistics, parse_scheme("gptq-int4-g16-asym"), settings)
    assert torch.equal(before, statistics.gradient_moment)
