"""H's factor is made once for all that use it, and again for another H."""

from __future__ import annotations

import gc

import pytest
import torch

from advisor.methods import ordering
from advisor.methods.ordering import ordered_factor
from advisor.numerics.linear_algebra import inverse_cholesky


def moment(seed):
    rows = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed))
    return rows.T @ rows


def test_columns_come_by_falling_diagonal_or_as_they_are():
    h = moment(0)
    found = ordered_factor(h, 0.1, by_activation=True)
    diagonal = h.diagonal()[found.order]
    assert torch.equal(diagonal, diagonal.sort(descending=True).values)
    expected = inverse_cholesky(h[found.order][:, found.order], 0.1).factor
    assert torch.equal(found.inverse.factor, expected)
    plain = ordered_factor(h, 0.1, by_activation=False)
    assert plain.order.tolist() == list(range(12))
    assert torch.equal(plain.inverse.factor, inverse_cholesky(h, 0.1).factor)


@pytest.mark.parametrize("by_activation", [True, False])
def test_what_is_left_of_an_input_is_what_later_ones_do_not_explain(by_activation):
    h = moment(3)
    found = ordered_factor(h, 0.1, by_activation=by_activation)
    damped = h.double() + 0.1 * h.double().diagonal().mean() * torch.eye(12)
    left = found.left_over()
    order = found.order.tolist()
    for place, column in enumerate(order):
        rest = [column, *order[place + 1 :]]  # the corner of the inverse is 1 / what is left
        expected = 1 / torch.linalg.inv(damped[rest][:, rest])[0, 0]
        assert float(left[column]) == pytest.approx(float(expected), rel=1e-4)
    assert bool((left <= damped.diagonal() * (1 + 1e-5)).all())


def test_one_factor_serves_until_something_differs(monkeypatch):
    made = []

    def counted(h, damping):
        made.append(damping)
        return inverse_cholesky(h, damping)

    monkeypatch.setattr(ordering, "inverse_cholesky", counted)
    h = moment(1)
    first = ordered_factor(h, 0.1, by_activation=True)
    assert ordered_factor(h, 0.1, by_activation=True) is first
    assert len(made) == 1
    ordered_factor(h, 0.2, by_activation=True)
    ordered_factor(h, 0.2, by_activation=False)
    ordered_factor(h.clone(), 0.2, by_activation=False)
    assert len(made) == 4
    again = ordered_factor(h, 0.2, by_activation=False)
    h[0, 0] += 1.0
    changed = ordered_factor(h, 0.2, by_activation=False)
    assert not torch.equal(again.inverse.factor, changed.inverse.factor)


def test_nothing_is_kept_of_an_h_that_is_gone():
    h = moment(2)
    ordered_factor(h, 0.1, by_activation=True)
    del h
    gc.collect()
    assert ordering._latest._found is None
