"""Rounding to nearest and GPTQ against their textbook twins in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import quantizer_cases as cases
import reference_quantizers as oracle
from quantizer_cases import COLUMNS, DEAD, FLOAT32, STORED, double

from advisor.methods import registry
from advisor.methods.settings import QuantizationSettings
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


@pytest.mark.parametrize("form", ["gch-sym", "gch-asym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn(weight, bits, form):
    scheme = parse_scheme(f"rtn-int{bits}-{form}")
    found = registry.quantize(weight, None, scheme, FLOAT32)
    expected = oracle.rtn(double(weight), cases.grid_of(scheme, FLOAT32), cases.width_of(scheme))
    # The largest of each group is at a tie (see STORED): either code is half a step off.
    cases.compare(found, expected, scheme, ties=expected.scales.size if scheme.symmetric else 0)
    ours = (found.dequantize().double() - weight.double()).square().sum()
    theirs = np.square(expected.dequantize() - double(weight)).sum()
    assert float(ours) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["g16-sym", "g16-asym"])
def test_rtn_chooses_codes_for_the_scales_as_stored(weight, scale_dtype, form):
    settings = QuantizationSettings(scale_dtype=scale_dtype)
    scheme = parse_scheme(f"rtn-int4-{form}")
    found = registry.quantize(weight, None, scheme, settings)
    expected = oracle.rtn(double(weight), cases.grid_of(scheme, settings), 16)
    np.testing.assert_array_equal(found.scales.double().numpy(), expected.scales)
    cases.compare(found, expected, scheme, ties=0)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("form", ["g16-sym", "g16-asym", "gch-sym"])
def test_rtn_with_clip_search(weight, statistics, weighted, form):
    scheme = parse_scheme(f"rtn-int3-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse")
    found = registry.quantize(weight, statistics if weighted else None, scheme, settings)
    factors = cases.clip_factors(settings, scheme)
    importance = np.diag(double(statistics.second_moment)) if weighted else None
    expected = oracle.rtn(
        double(weight),
        cases.grid_of(scheme),
        cases.width_of(scheme),
        factors=factors,
        importance=importance,
    )
    assert not any(
        cases.undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0)
    )
    cases.compare(found, expected, scheme)


@pytest.mark.parametrize("form", ["gch-sym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(weight, inputs, statistics, bits, form):
    scheme = parse_scheme(f"gptq-int{bits}-{form}")
    found = registry.quantize(weight, statistics, scheme, STORED[scheme.symmetric])
    expected = oracle.gptq(
        double(weight),
        double(statistics.second_moment),
        cases.grid_of(scheme),
        cases.width_of(scheme),
    )
    cases.compare(found, expected, scheme, in_order=range(COLUMNS))
    cases.same_error(found, expected, weight, inputs, 0.02)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_gptq_damps_by_a_share_of_the_mean_diagonal(weight, statistics, damping):
    scheme = parse_scheme("gptq-int4-g16-asym")
    settings = QuantizationSettings(scale_dtype="float32", damping=damping)
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = double(statistics.second_moment)
    expected = oracle.gptq(double(weight), moment, cases.grid_of(scheme), 16, damping=damping)
    cases.compare(found, expected, scheme, in_order=range(COLUMNS))


@pytest.mark.parametrize("column_block", [8, 24, 32])
def test_gptq_groups_see_all_updates_whatever_the_block(weight, statistics, column_block):
    scheme = parse_scheme("gptq-int4-g16-sym")
    settings = QuantizationSettings(column_block=column_block)
    found = registry.quantize(weight, statistics, scheme, settings)
    expected = oracle.gptq(
        double(weight), double(statistics.second_moment), cases.grid_of(scheme), 16
    )
    cases.compare(found, expected, scheme, in_order=range(COLUMNS))


@pytest.mark.parametrize("form", ["gch-sym", "g16-sym", "g16-asym", "g8-asym"])
@pytest.mark.parametrize("static", [False, True])
def test_gptq_in_activation_order(weight, inputs, statistics, form, static):
    scheme = parse_scheme(f"gptq-int4-{form}" + ("" if static else "-actorder"))
    settings = replace(STORED[scheme.symmetric], static_groups=static)
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = double(statistics.second_moment)
    order = oracle.activation_order(moment)
    assert order[-1] == DEAD
    expected = oracle.gptq(
        double(weight),
        moment,
        cases.grid_of(scheme),
        cases.width_of(scheme),
        order=order,
        static=static,
    )
    cases.compare(found, expected, scheme, in_order=order)
    cases.same_error(found, expected, weight, inputs, 0.02)


@pytest.mark.parametrize(
    ("form", "static"),
    [("g16-sym", False), ("g16-asym-actorder", False), ("g16-asym", True), ("gch-sym", True)],
)
def test_gptq_with_clip_search(weight, statistics, form, static):
    scheme = parse_scheme(f"gptq-int3-{form}")
    settings = replace(STORED[scheme.symmetric], clip="mse", static_groups=static)
    found = registry.quantize(weight, statistics, scheme, settings)
    moment = double(statistics.second_moment)
    ordered = scheme.activation_order or static
    order = oracle.activation_order(moment) if ordered else list(range(COLUMNS))
    expected = oracle.gptq(
        double(weight), moment, cases.grid_of(scheme), cases.width_of(scheme), order=order,
        static=static,
        factors=cases.clip_factors(settings, scheme),
    )  # fmt: skip
    assert not any(
        cases.undecided(losses) for key, losses in expected.ranges.items() if key != (3, 0)
    )
    cases.compare(found, expected, scheme, in_order=order)


def test_gptq_of_many_schemes_at_once(weight, statistics):
    names = [
        "gptq-int2-g16-asym", "gptq-int8-gch-sym", "gptq-int4-g8-sym", "gptq-int3-g16-asym",
        "gptq-int4-g16-sym-actorder", "gptq-int5-g24-sym", "rtn-int4-g16-sym", "gptq-int6-g48-asym",
    ]  # fmt: skip
    schemes = [parse_scheme(name) for name in names]
    moment = double(statistics.second_moment)
    by_activation = oracle.activation_order(moment)
    found = registry.quantize_many(weight, statistics, schemes, QuantizationSettings())
    for scheme, result in zip(schemes, found, strict=True):
        assert result.scheme == scheme
        grid = cases.grid_of(scheme, QuantizationSettings())
        if scheme.method == "rtn":
            cases.compare(result, oracle.rtn(double(weight), grid, 16), scheme)
            continue
        order = by_activation if scheme.activation_order else list(range(COLUMNS))
        expected = oracle.gptq(double(weight), moment, grid, cases.width_of(scheme), order=order)
        cases.compare(result, expected, scheme, in_order=order)


@pytest.mark.parametrize("form", ["g16-asym", "g16-sym-actorder"])
def test_gptq_from_fewer_tokens_than_inputs(weight, inputs, form):
    """H has no inverse of its own: damping alone gives it one."""
    scheme = parse_scheme(f"gptq-int4-{form}")
    statistics = cases.make_statistics(inputs[:20])
    found = registry.quantize(weight, statistics, scheme, STORED[scheme.symmetric])
    moment = double(statistics.second_moment)
    assert np.linalg.matrix_rank(moment, tol=1e-4) <= 20
    order = oracle.activation_order(moment) if scheme.activation_order else list(range(COLUMNS))
    expected = oracle.gptq(double(weight), moment, cases.grid_of(scheme), 16, order=order)
    cases.compare(found, expected, scheme, in_order=order)
