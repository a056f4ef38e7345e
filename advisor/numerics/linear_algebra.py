"""The inverse Cholesky factor that GPTQ's updates need, and quadratic forms."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from advisor.errors import InputError

_SOLVED_AT_ONCE = 96
"""Columns of a triangle that is inverted by substitution."""
_PANEL = 256
"""Columns of H whose products are left out together where symmetry gives them."""
logger = logging.getLogger(__name__)

_LARGEST_DAMPING = 1e4
"""At this share of the mean diagonal the factor is nearly diagonal: more would change nothing."""


@dataclass(frozen=True, slots=True)
class InverseCholesky:
    """Upper triangular U with UᵀU = (H + damping * mean(diag H) * I)^-1.

    Attributes:
        factor: float32, shape [n, n], upper triangular.
        damping: Share of the mean diagonal that was added in the end.
        raised: Whether that is more than was asked for.
    """

    factor: Tensor
    damping: float
    raised: bool


def inverse_cholesky(second_moment: Tensor, damping: float) -> InverseCholesky:
    """Factor the inverse of a damped second moment.

    Inputs that were never active need no special case: damping alone makes their pivot positive,
    and having no correlation they neither send nor receive updates. A matrix of zeros counts as
    the identity. Where the factorization fails (H not positive definite in floating point),
    damping is raised tenfold until it succeeds; the result says so.

    With the order of rows and columns reversed, H = R Rᵀ for an upper triangular R, so U = R^-1:
    one factorization and one triangular inverse, against GPTQ's Cholesky, inverse, Cholesky. It is
    computed in float64 since the errors of a nearly singular H otherwise show in the codes. On an
    accelerator too: one with an eighth or a 64th of its float32 rate in float64 (those for gaming)
    takes (2/3) n³ operations at that rate for a factor, of which there is one for each input group
    and call; loops over columns, and all that is computed per token, are float32.

    Args:
        second_moment: H, shape [n, n], symmetric; not modified.
        damping: Share of the mean diagonal added to the diagonal, above 0.

    Raises:
        InputError: H has a value that is not finite, a negative diagonal, or damping is not
            positive, or no damping up to 10^4 makes it positive definite.

    Reference: GPTQ, arXiv:2210.17323, section 3.3, step 3 (Cholesky reformulation).
    """
    if not damping > 0:
        raise InputError(f"damping must be above 0, but got {damping}. The usual value is 0.01.")
    diagonal = second_moment.diagonal()
    if not all(value.isfinite() for value in second_moment.aminmax()):
        raise InputError(
            "the second moment of the calibration inputs has values that are not finite: "
            "collect the statistics again, in float32."
        )
    if bool((diagonal < 0).any()):
        raise InputError("the second moment of the calibration inputs has a negative diagonal.")
    mean = float(diagonal.double().mean())
    reversed_moment = second_moment.flip(0, 1).double()
    reversed_diagonal = reversed_moment.diagonal()
    original = reversed_diagonal.clone()
    unit = mean if mean > 0 else 1.0
    asked = damping
    if mean == 0:
        original = torch.ones_like(original)
    while True:
        reversed_diagonal.copy_(original + damping * unit)
        lower, failed = torch.linalg.cholesky_ex(reversed_moment)
        if not int(failed):
            break
        damping *= 10
        if damping > _LARGEST_DAMPING:
            raise InputError(
                "the second moment of the calibration inputs is not positive semidefinite: no "
                f"damping up to {_LARGEST_DAMPING:g} makes it so. Collect the statistics again."
            )
    if damping != asked:
        logger.warning("damping raised from %g to %g: H is singular", asked, damping)
    del reversed_moment, reversed_diagonal
    inverse = invert_lower(lower)
    del lower
    factor = inverse.to(torch.float32)
    del inverse
    factor = factor.flip(0, 1)
    return InverseCholesky(factor=factor, damping=damping, raised=damping != asked)


def invert_lower(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix.

    Halves are inverted in turn, and their corner is a product of three: fewer operations than
    solving for a whole identity, in large products (58 ms against 118 at n = 1536, one core).

    Args:
        lower: Shape [n, n]; what is above the diagonal is not read. Not modified.
    """
    size = len(lower)
    if size <= _SOLVED_AT_ONCE:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = invert_lower(lower[:half, :half])
    inverse[half:, half:] = invert_lower(lower[half:, half:])
    corner = inverse[half:, half:] @ (lower[half:, :half] @ inverse[:half, :half])
    inverse[half:, :half] = corner.neg_()
    return inverse


def half_product(delta: Tensor, moment: Tensor) -> Tensor:
    """Return D T for a T with T + Tᵀ = H: all that a quadratic form of D needs, with less work.

    T holds what is left of and below the squares on H's diagonal, and half of those. Then
    tr(G D H Dᵀ) = 2 tr(G D T Dᵀ) for every symmetric G, at 70% of the products at n = 576 and 58%
    at n = 1536.

    Args:
        delta: D, shape [rows, n].
        moment: H, symmetric, shape [n, n]; not modified.
    """
    result = torch.empty_like(delta)
    for start in range(0, len(moment), _PANEL):
        stop = min(start + _PANEL, len(moment))
        panel = moment[start:, start:stop].clone()
        panel[: stop - start] *= 0.5
        torch.mm(delta[:, start:], panel, out=result[:, start:stop])
    return result


def quadratic_rows(delta: Tensor, second_moment: Tensor) -> Tensor:
    """Return dᵀ H d of every row d of ``delta``: float32, shape [rows], never negative.

    Args:
        delta: float32, shape [rows, n].
        second_moment: H, float32, shape [n, n].
    """
    products = half_product(delta, second_moment)
    return products.mul_(delta).sum(dim=1).mul_(2.0).clamp_(min=0.0)
