"""In which order columns are worked on, and H's factor in that order."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from advisor.numerics.linear_algebra import InverseCholesky, inverse_cholesky


@dataclass(frozen=True, slots=True)
class OrderedFactor:
    """H's factor, of columns in the order of work.

    Attributes:
        order: Columns in that order, int64 [in].
        inverse: The factor of H with rows and columns in it.
    """

    order: Tensor
    inverse: InverseCholesky

    def left_over(self) -> Tensor:
        """Return what a column's squared error costs once later columns have made up for it.

        That is H's diagonal less all that the columns after it explain: with H⁻¹ = UᵀU in the order
        of work, GPTQ's loss is the sum of e²/U²ⱼⱼ.

        Returns:
            float32 [in], in the model's order.

        Reference: GPTQ, arXiv:2210.17323, equation 2.
        """
        variances = self.inverse.factor.diagonal().square().reciprocal()
        return torch.empty_like(variances).index_copy_(0, self.order, variances)


def activation_order(second_moment: Tensor) -> Tensor:
    """Return the columns by falling diagonal of H, int64 [in]; equal ones keep their order."""
    return torch.argsort(second_moment.diagonal(), descending=True, stable=True)


def ordered_factor(second_moment: Tensor, damping: float, *, by_activation: bool) -> OrderedFactor:
    """Return H's factor with columns in activation order, or in their own.

    The latest one is kept as long as its H is: GPTQ on integers, NVFP4 and MXFP4 of one module are
    scored one after the other.

    Args:
        second_moment: H, float32 [in, in]; not modified, now or later.
        damping: As :func:`advisor.numerics.linear_algebra.inverse_cholesky` takes it.
        by_activation: Whether columns come in activation order.

    Raises:
        InputError: See :func:`advisor.numerics.linear_algebra.inverse_cholesky`.
    """
    found = _latest.find(second_moment, damping, by_activation)
    if found is None:
        if by_activation:
            order = activation_order(second_moment)
            inverse = inverse_cholesky(second_moment[order][:, order], damping)
        else:
            order = torch.arange(len(second_moment), device=second_moment.device)
            inverse = inverse_cholesky(second_moment, damping)
        found = OrderedFactor(order, inverse)
        _latest.keep(second_moment, damping, by_activation, found)
    return found


class _Latest:
    """The last factor that was made, until its H is gone or changed."""

    def __init__(self) -> None:
        self._moment: weakref.ref[Tensor] | None = None
        self._made_with: tuple[int, float, bool] | None = None
        self._found: OrderedFactor | None = None

    def find(self, moment: Tensor, damping: float, by_activation: bool) -> OrderedFactor | None:
        """Return the factor of this very tensor, made with these settings, if it is the last."""
        known = None if self._moment is None else self._moment()
        same = known is moment and self._made_with == (moment._version, damping, by_activation)
        return self._found if same else None

    def keep(
        self, moment: Tensor, damping: float, by_activation: bool, found: OrderedFactor
    ) -> None:
        """Take up a factor in place of the last."""
        self._made_with = (moment._version, damping, by_activation)
        self._moment, self._found = weakref.ref(moment, self._forget), found

    def _forget(self, moment: weakref.ref[Tensor]) -> None:
        """Drop the factor of an H that is gone, unless another has taken its place."""
        if moment is self._moment:
            self._moment = self._found = None


_latest = _Latest()
