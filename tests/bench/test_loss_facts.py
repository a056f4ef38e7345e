"""Loss against published tables, every family predicted from the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def fit_loss():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import fit_loss
    finally:
        sys.path.pop(0)
    return fit_loss


def test_cross_validated_by_family(fit_loss, capsys):
    cells = fit_loss.load_cells()
    scores = fit_loss.summary(fit_loss.cross_validate(cells))
    with capsys.disabled():
        print("\nloss, cross-validated by family:", scores)
    assert scores["cells"] > 500
    assert scores["median_factor"] < 1.55
    assert scores["within_2x"] > 0.65
    assert scores["pairs_right_not_collapsed"] > 0.95
    assert scores["collapse_recall"] > 0.8
    assert scores["collapse_precision"] > 0.85


def test_the_shipped_coefficients_are_those_of_the_fit(fit_loss):
    from advisor.predict.loss import load_loss_model

    values, _ = fit_loss.fit(fit_loss.load_cells())
    shipped = load_loss_model().coefficients
    assert shipped["low_bits"] == pytest.approx(values["low_bits"], abs=1e-3)
    assert shipped["per_channel"] == pytest.approx(values["per_channel"], abs=1e-3)
