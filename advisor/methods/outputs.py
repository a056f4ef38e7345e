"""How far the output gradients' second moment is believed, and what it means for rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings


def output_metric(
    statistics: LayerStatistics, settings: QuantizationSettings, outputs: int
) -> Tensor | None:
    """Return G as far as it is to be believed, float32 [out, out]; None for independent rows.

    Off-diagonals are shrunk to ``output_feedback`` times T / (T + out): G of T tokens is the less
    certain, the more outputs it relates. The diagonal is damped by ``output_damping`` of its mean.

    Args:
        statistics: Of the linear itself; G is used where it is whole.
        settings: ``output_feedback`` and ``output_damping``.
        outputs: Of the weight that is quantized.

    Raises:
        InputError: G is of another number of outputs.
    """
    gradient = statistics.gradient_moment
    if not settings.output_feedback or gradient is None or gradient.ndim == 1:
        return None
    if len(gradient) != outputs:
        raise InputError(
            f"output_feedback needs the gradients of this weight's {outputs} outputs, but got "
            f"those of {len(gradient)}: quantize linears that share an input one by one."
        )
    tokens = min(statistics.tokens, statistics.gradient_tokens)
    share = settings.output_feedback * tokens / (tokens + len(gradient))
    diagonal = gradient.diagonal()
    mean = float(diagonal.double().mean())
    metric = gradient.float() * share
    metric.diagonal().copy_(diagonal + settings.output_damping * (mean if mean > 0 else 1.0))
    return metric


def feedback_of(metric: Tensor, rows: slice) -> Tensor:
    """Return what the errors of all rows mean for a block of rows, float32 [block, rows].

    tr(G ΔW H ΔWᵀ) as a function of the block b alone is least for ΔW_b = -G_bb⁻¹ G_b,others
    ΔW_others. The block's own columns are zero.
    """
    lower = torch.linalg.cholesky(metric[rows, rows])
    feedback = torch.cholesky_inverse(lower) @ metric[rows]
    feedback[:, rows] = 0
    return feedback


def far_apart(rows: int, count: int) -> list[slice]:
    """Cut rows into blocks of every so many-th row.

    Rows of one block do not make up for each other, and neighbours, of one head, have the most to
    make up for. A block of SmolLM2-135M, ½ tr(G ΔW H ΔWᵀ) of its linears in 1e-3 nats (32x256
    calibration tokens, three passes of descent in 3 to 8 blocks of neighbours, in 4 of every fourth
    row, and those with the wave front's blocks cut alike): int4 g32 asym 0.776, 0.676, 0.666, nvfp4
    0.850, 0.740, 0.737. KL of the whole model in int4 g32 asym on 32x256 held-out tokens 0.0388
    before, 0.0374 with both.
    """
    return [slice(first, rows, count) for first in range(count)]


def row_spans(rows: int, size: int) -> list[slice]:
    """Cut rows into blocks."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
