"""What a changed weight costs, in closed form from the calibration statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.numerics.linear_algebra import quadratic_rows
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from advisor.calibration.statistics import LayerStatistics


def row_errors(
    weight: Tensor, changed: QuantizedWeight | Tensor, statistics: LayerStatistics
) -> Tensor:
    """Return the mean squared change of each output over the calibration tokens.

    Args:
        weight: The reference, [out, in], any floating type.
        changed: The quantized or dequantized weight of the same shape.
        statistics: Of the inputs.

    Returns:
        float32, shape [out]: the diagonal of ΔW H ΔWᵀ, per (weighted) token. The sum
        over the rows of a linear is its :func:`layer_error`, which is how the rows of stacked
        weights are told apart.

    Raises:
        InputError: There are no tokens.
    """
    if statistics.tokens < 1:
        raise InputError("an error per token needs tokens, but the statistics have 0.")
    second_moment = statistics.second_moment.to(torch.float32)
    return quadratic_rows(weight_delta(weight, changed), second_moment) / statistics.rows


def layer_error(
    weight: Tensor, changed: QuantizedWeight | Tensor, statistics: LayerStatistics
) -> float:
    """Return tr(ΔW H ΔWᵀ) per (weighted) token: the mean squared change of an output vector."""
    return float(row_errors(weight, changed, statistics).double().sum())


def kl_score(delta: Tensor, statistics: LayerStatistics) -> float:
    """Return the KL divergence, in nats per token, that a change of one weight should cause.

    To second order KL(p ‖ p') of the model's next-token distribution is half the quadratic form of
    the Fisher information, which is taken as the Kronecker product of the two second moments:
    ½ tr(G/n_g · ΔW · H/n · ΔWᵀ). Changes of several linears add up only roughly.

    Args:
        delta: Changed minus reference weight, [out, in].
        statistics: With a gradient moment, full [out, out] or its diagonal [out].

    Raises:
        InputError: There was no backward pass, or shapes disagree.

    Reference: K-FAC, arXiv:1503.05671, section 3, for the factorization; gradients are those
    of the true Fisher (:mod:`advisor.calibration.fisher`).
    """
    gradient_moment = statistics.gradient_moment
    if gradient_moment is None or statistics.gradient_tokens < 1 or statistics.tokens < 1:
        raise InputError(
            "the KL score needs output gradients: collect the statistics with gradients=True."
        )
    if gradient_moment.shape[0] != delta.shape[0]:
        raise InputError(
            f"the gradient moment is of {gradient_moment.shape[0]} outputs, "
            f"but the weight has {delta.shape[0]}."
        )
    delta = delta.to(torch.float32)
    second_moment = statistics.second_moment.to(torch.float32)
    weights = gradient_moment.to(torch.float32)
    if weights.ndim == 1:
        total = (quadratic_rows(delta, second_moment).double() * weights.double()).sum()
    else:
        spread = torch.mm(weights, delta)
        total = torch.mm(delta, second_moment).mul_(spread).sum(dtype=torch.float64)
    return max(0.0, float(total)) / (2.0 * statistics.rows * statistics.gradient_tokens)


def weight_delta(weight: Tensor, changed: QuantizedWeight | Tensor) -> Tensor:
    """Return changed minus reference weight, float32.

    Raises:
        InputError: The shapes differ.
    """
    other = changed.dequantize() if isinstance(changed, QuantizedWeight) else changed
    if other.shape != weight.shape:
        raise InputError(
            f"the weight has shape {list(weight.shape)}, its changed form {list(other.shape)}."
        )
    return other.to(torch.float32) - weight.to(torch.float32)
