"""SmoothQuant: outliers of the inputs moved into the weights, for int8 arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods import rtn
from advisor.methods.checks import prepare_weight, require_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

_SMALLEST_MAGNITUDE = 1e-5


def smoothing_scales(
    weights: Sequence[Tensor],
    statistics: LayerStatistics,
    settings: QuantizationSettings,
) -> Tensor:
    """Return the factor by which each input is divided and each weight column multiplied.

    s = max|x|^alpha / max|w|^(1 - alpha), per input channel.

    Args:
        weights: The linears that share the inputs, each [out, in]; not modified.
        statistics: Of the inputs before smoothing.
        settings: ``smoothing`` is alpha: 0 leaves all to the inputs, 1 all to the weights.

    Returns:
        float32 [in], positive; 1 where an input or its weights are all zero.

    Raises:
        InputError: alpha is not in [0, 1], or shapes disagree.

    Reference: SmoothQuant, arXiv:2211.10438, section 4, equation 4.
    """
    alpha = settings.smoothing
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"smoothing must be in [0, 1], but got {alpha}. The usual value is 0.5.")
    if not weights:
        raise InputError("smoothing needs at least one weight, but got none.")
    in_features = weights[0].shape[1]
    require_statistics(statistics, in_features, "smoothquant")
    largest = torch.stack([prepare_weight(w, []).abs().amax(dim=0) for w in weights]).amax(dim=0)
    inputs = statistics.absolute_maximum.to(device=largest.device, dtype=torch.float32)
    scales = inputs.clamp(min=_SMALLEST_MAGNITUDE).pow(alpha) / largest.clamp(
        min=_SMALLEST_MAGNITUDE
    ).pow(1.0 - alpha)
    live = (inputs > 0) & (largest > 0)
    return torch.where(live, scales.clamp(min=_SMALLEST_MAGNITUDE), torch.ones_like(scales))


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Round a weight whose columns were already multiplied by the smoothing scales.

    See :func:`advisor.methods.rtn.quantize`.
    """
    return rtn.quantize(weight, statistics, scheme, settings)
