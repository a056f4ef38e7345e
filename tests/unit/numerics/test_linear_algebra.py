from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from advisor.errors import InputError
from advisor.numerics import linear_algebra
from advisor.numerics.linear_algebra import inverse_cholesky, quadratic_rows


def second_moment(size, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, size, generator=generator)
    return inputs.t() @ inputs


def test_factor_is_that_of_three_textbook_steps():
    moment = second_moment(30, 200)
    damped = moment.double() + 0.05 * moment.double().diagonal().mean() * torch.eye(30)
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = inverse_cholesky(moment, 0.05)
    torch.testing.assert_close(found.factor, textbook.float(), rtol=1e-5, atol=1e-9)
    assert torch.equal(found.factor, found.factor.triu())
    assert (found.damping, found.raised) == (0.05, False)


def test_input_is_not_modified():
    moment = second_moment(12, 40)
    kept = moment.clone()
    inverse_cholesky(moment, 0.01)
    assert torch.equal(moment, kept)


def test_singular_moment_is_handled_by_the_usual_damping():
    found = inverse_cholesky(second_moment(64, 3), 0.01)
    assert bool(torch.isfinite(found.factor).all())
    assert not found.raised


def test_raised_damping_is_reported(caplog):
    moment = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues 2.5 and -0.5
    with caplog.at_level(logging.WARNING):
        found = inverse_cholesky(moment, 0.01)
    assert found.raised
    assert found.damping == pytest.approx(1.0)
    assert "raised from 0.01 to 1" in caplog.text


def test_dead_inputs_neither_send_nor_receive():
    moment = second_moment(10, 50)
    moment[4], moment[:, 4] = 0.0, 0.0
    factor = inverse_cholesky(moment, 0.01).factor
    others = [i for i in range(10) if i != 4]
    assert bool((factor[4, others] == 0).all())
    assert bool((factor[others, 4] == 0).all())
    assert factor[4, 4] > 0


def test_zero_moment_counts_as_identity():
    factor = inverse_cholesky(torch.zeros(5, 5), 0.25).factor
    torch.testing.assert_close(factor, torch.eye(5) / 1.25**0.5)


@pytest.mark.parametrize(
    ("moment", "damping", "message"),
    [
        (torch.eye(3), 0.0, "damping must be above 0, but got 0"),
        (torch.eye(3) * float("nan"), 0.01, "not finite"),
        (-torch.eye(3), 0.01, "negative diagonal"),
        (torch.tensor([[1.0, 1e6], [1e6, 1.0]]), 0.01, "not positive semidefinite"),
    ],
)
def test_bad_moments_are_refused(moment, damping, message):
    with pytest.raises(InputError, match=message):
        inverse_cholesky(moment, damping)


def test_quadratic_rows_is_the_diagonal_of_the_form():
    moment = second_moment(9, 30)
    delta = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    expected = (delta @ moment @ delta.t()).diagonal()
    torch.testing.assert_close(quadratic_rows(delta, moment), expected)


@pytest.mark.parametrize("size", [1, 2, 95, 97, 250])
def test_inverse_of_a_triangle(size):
    """Sizes on both sides of what is solved at once, and halves that are not equal."""
    generator = torch.Generator().manual_seed(size)
    lower = torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    lower.diagonal().abs_().add_(1.0)
    inverse = linear_algebra.invert_lower(lower)  # what is above the diagonal is not read
    assert torch.equal(inverse, inverse.tril())
    expected = np.linalg.inv(lower.tril().numpy())
    np.testing.assert_allclose(inverse.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [7, 256, 300])
def test_half_product_is_half_of_the_quadratic_form(size):
    generator = torch.Generator().manual_seed(size)
    moment = second_moment(size, 2 * size)
    delta = torch.randn(9, size, generator=generator)
    outer = second_moment(9, 20, seed=1).double()
    kept = moment.clone()
    half = linear_algebra.half_product(delta, moment).double()
    exact = delta.double() @ moment.double()
    form = delta.double() @ exact.T
    torch.testing.assert_close(half @ delta.double().T + delta.double() @ half.T, form, rtol=1e-4,
                               atol=1e-4 * float(form.abs().max()))  # fmt: skip
    weighted = 2 * ((outer @ delta.double()) * half).sum()
    assert float(weighted) == pytest.approx(float((outer * form).sum()), rel=1e-4)
    assert torch.equal(moment, kept)
