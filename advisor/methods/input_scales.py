"""The scale of inputs that are quantized with one calibrated scale, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from advisor.methods.checks import require_statistics
from advisor.numerics.codebooks import E4M3_LARGEST

if TYPE_CHECKING:
    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight

_LARGEST = {"int8": 127.0, "fp8": E4M3_LARGEST}
INPUT_SCALE = "input_scale"
"""Name in a weight's ``extras`` and in checkpoints."""


def with_input_scale(
    weight: QuantizedWeight, statistics: LayerStatistics | None, settings: QuantizationSettings
) -> QuantizedWeight:
    """Return a weight that also has the scale of its inputs, in ``extras["input_scale"]``.

    It is the largest magnitude that calibration saw over the type's largest value, float32 [1];
    larger inputs saturate at run time. Linears that share an input get the same one, which is
    what engines that fuse them expect. It is rounded as weight scales are, so that readers which
    keep it in the model's data type compute the same.

    Args:
        weight: Its scheme has static activations.
        statistics: Of the inputs, after any scales were divided out.
        settings: Rounding of scales.

    Raises:
        InputError: There are no statistics.
    """
    scheme = weight.scheme
    found = require_statistics(statistics, weight.shape[1], f"{scheme}'s input scale")
    largest = found.absolute_maximum.amax().to(torch.float32).reshape(1).cpu()
    scale = settings.round_scales(largest / _LARGEST[str(scheme.activation)])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return replace(weight, extras={**weight.extras, INPUT_SCALE: scale})
