"""GPTQ onto FP8: the column loop with E4M3's unequal steps instead of an integer grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.methods import rtn
from advisor.methods.checks import prepare_weight, require_statistics
from advisor.methods.ordering import ordered_factor
from advisor.numerics.codebooks import decode_e4m3, encode_e4m3
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to FP8 so that its outputs on the calibration inputs change least.

    Scales come from the weight before any update, so columns may come in activation order
    (``-actorder`` or ``settings.static_groups``) whatever shares a scale.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs.
        scheme: gptq-fp8 per channel, tensor or block.
        settings: ``damping``, ``column_block``, ``static_groups``, rounding of scales.

    Raises:
        InputError: The weight, the statistics or a setting cannot be used.

    Reference: GPTQ, arXiv:2210.17323, Algorithm 1.

    Differs from the paper: E4M3 codes; weights that updates carry past the largest code saturate.
    """
    values = prepare_weight(weight, [scheme])
    found = require_statistics(statistics, weight.shape[1], "gptq")
    if settings.column_block < 1:
        raise InputError(f"column_block must be at least 1, but got {settings.column_block}.")
    rounded = rtn.round_fp8(values, scheme, settings)
    second_moment = found.second_moment.to(device=values.device, dtype=torch.float32)
    by_activation = scheme.activation_order or settings.static_groups
    made = ordered_factor(second_moment, settings.damping, by_activation=by_activation)
    order, factor = made.order, made.inverse
    scales = rtn.spread_scales(rounded.scales, scheme, (values.shape[0], values.shape[1]))
    ordered = scales[:, order].t().contiguous()

    def nearest(column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        codes = encode_e4m3(column / ordered[index])
        return codes, decode_e4m3(codes) * ordered[index]

    codes = quantize_in_turn(
        values[:, order].t().contiguous(), nearest, factor.factor, settings.column_block
    )
    return QuantizedWeight(
        scheme=scheme,
        codes=codes[torch.argsort(order)].t().contiguous(),
        scales=rounded.scales,
        extras={"damping": torch.tensor(factor.damping)} if factor.raised else {},
    )


def quantize_in_turn(
    working: Tensor,
    nearest: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    factor: Tensor,
    block: int,
    parts: int = 1,
) -> Tensor:
    """Quantize columns in turn, each time making up for the error in the columns to come.

    Args:
        working: float32 [in, out], overwritten.
        nearest: From a column [out] and its index to its codes and what they stand for.
        factor: Upper triangular inverse Cholesky factor, [in, in].
        block: Columns updated one by one; later ones get their updates as a matrix product.
        parts: Weights that lie side by side in ``working``: each has products of its own, so that
            its codes do not depend on its neighbours.

    Returns:
        uint8 [in, out].
    """
    columns = working.shape[0]
    codes = torch.empty_like(working, dtype=torch.uint8)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = working.new_empty(end - start, working.shape[1])
        for column in range(start, end):
            codes[column], values = nearest(working[column], column)
            error = (working[column] - values) / factor[column, column]
            errors[column - start] = error
            working[column + 1 : end] -= factor[column, column + 1 : end].unsqueeze(1) * error
        for later, made in zip(
            working[end:].tensor_split(parts, 1), errors.tensor_split(parts, 1), strict=True
        ):
            later -= factor[start:end, end:].t() @ made
    return codes
