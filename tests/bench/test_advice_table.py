"""The speed model beside the published formula of whichllm, on the same points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def table():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import advice_table
    finally:
        sys.path.pop(0)
    return advice_table


@pytest.mark.parametrize("engine", ["vllm", "transformers", "llama.cpp"])
def test_nearer_than_the_formula_for_one_sequence_on_one_gpu(table, engine):
    ours, theirs = [], []
    for point, spec, gpu in table.single_points(engine):
        quant = table.quant_of(point.method)
        if quant is not None:
            ours.append((point.predicted, point.measured))
            theirs.append((table.whichllm_speed(spec, quant, gpu), point.measured))
    assert len(ours) >= 15
    assert table.mape(ours) < 0.6 * table.mape(theirs)


def test_models_that_the_fit_has_not_seen(table):
    held = table.speed_held_out("vllm", "model", 60)
    assert table.mape([(p.predicted, p.measured) for p in held]) < 0.3
