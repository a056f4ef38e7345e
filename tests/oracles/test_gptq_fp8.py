"""GPTQ onto FP8 against its textbook twin in float64."""

from __future__ import annotations

import numpy as np
import pytest
import quantizer_cases as cases
import reference_microscaling as floats
import reference_quantizers as oracle
from quantizer_cases import COLUMNS, FLOAT32, double

from advisor.methods.errors import layer_error
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme


def _gptq_fp8(weight, moment, scales, order):
    """GPTQ as OBQ steps with an explicit inverse, onto E4M3 with one scale per weight."""
    weight, moment = weight.copy(), moment.copy()
    inverse = np.linalg.inv(moment + 0.01 * np.diag(moment).mean() * np.eye(COLUMNS))
    result, remaining = np.zeros_like(weight), list(order)
    for column in order:
        remaining.remove(column)
        for row in range(len(weight)):
            scale = scales[row, column]
            value = weight[row, column]
            result[row, column] = floats.nearest(value / scale, floats.E4M3) * scale
            error = (value - result[row, column]) / inverse[column, column]
            for other in remaining:
                weight[row, other] -= error * inverse[column, other]
        pivot = inverse[column, column]
        inverse = inverse - np.outer(inverse[:, column], inverse[column, :]) / pivot
    return result


def _scales(weight, form):
    full = np.zeros_like(weight)
    rows, columns = {"gch": (1, COLUMNS), "gtensor": weight.shape, "b16": (16, 16)}[form]
    for row in range(0, weight.shape[0], rows):
        for column in range(0, COLUMNS, columns):
            tile = (slice(row, row + rows), slice(column, column + columns))
            full[tile] = np.abs(weight[tile]).max() / 448 or 1.0
    return full


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("form", ["gch", "gtensor", "b16"])
def test_gptq_fp8(form, ordered):
    weight, inputs = cases.make_weight(0, rows=20), cases.make_inputs(0)
    statistics = cases.make_statistics(inputs)
    settings = QuantizationSettings(
        scale_dtype="float32", static_groups=ordered, damping=0.01, column_block=20
    )
    found = quantize(weight, statistics, parse_scheme(f"gptq-fp8-{form}"), settings)
    moment = double(statistics.second_moment)
    order = oracle.activation_order(moment) if ordered else list(range(COLUMNS))
    expected = _gptq_fp8(double(weight), moment, _scales(double(weight), form), order)
    values = double(found.dequantize())
    # After a value at a tie the rest of its row may differ: rows are the same from end to end.
    same = np.isclose(values, expected, rtol=1e-5, atol=1e-9).all(axis=1)
    assert same.mean() >= 0.85
    rounded = quantize(weight, statistics, parse_scheme(f"rtn-fp8-{form}"), FLOAT32)
    ours = layer_error(weight, found, statistics)
    theirs = ((double(inputs) @ (expected - double(weight)).T) ** 2).sum() / len(inputs)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours < 0.8 * layer_error(weight, rounded, statistics)
