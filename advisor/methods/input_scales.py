"""Calibrated scales of inputs that are quantized at run time, whatever the method."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from advisor.methods.checks import require_statistics
from advisor.methods.grids import check_scales
from advisor.numerics.codebooks import E4M3_LARGEST
from advisor.numerics.microscaling import global_scale

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

_LARGEST = {"int8": 127.0, "fp8": E4M3_LARGEST}
INPUT_SCALE = "input_scale"
"""Name in a weight's ``extras`` and in checkpoints."""
INPUT_GLOBAL_SCALE = "input_global_scale"
"""The same of NVFP4's."""


def for_inputs(
    weight: QuantizedWeight,
    scheme: Scheme,
    statistics: LayerStatistics | None,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Return a weight's codes under a scheme that differs in what is done to its inputs alone.

    Args:
        weight: Its scheme has the same codes.
        scheme: The one wanted.
        statistics: Of the inputs; needed where they have a calibrated scale.
        settings: Rounding of scales.

    Raises:
        InputError: There are no statistics.
    """
    own = {INPUT_SCALE, INPUT_GLOBAL_SCALE}
    extras = {name: value for name, value in weight.extras.items() if name not in own}
    if scheme.activation == "nvfp4":
        extras[INPUT_GLOBAL_SCALE] = input_global_scale(scheme, statistics, weight.shape[1])
    found = replace(weight, scheme=scheme, extras=extras)
    return with_input_scale(found, statistics, settings) if scheme.static_activation else found


def input_global_scale(
    scheme: Scheme, statistics: LayerStatistics | None, in_features: int
) -> Tensor:
    """Return the global scale of NVFP4 inputs: 448 * 6 / max |x| of calibration, float32 [1].

    Raises:
        InputError: There are no statistics.
    """
    found = require_statistics(statistics, in_features, f"{scheme}'s input scale")
    return global_scale(found.absolute_maximum.amax()).cpu()


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
        InputError: There are no statistics, or the scale is out of its data type's range.
    """
    scheme = weight.scheme
    found = require_statistics(statistics, weight.shape[1], f"{scheme}'s input scale")
    largest = found.absolute_maximum.amax().to(torch.float32).reshape(1).cpu()
    scale = settings.store_scales(largest / _LARGEST[str(scheme.activation)])
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    check_scales(scale, settings)
    return replace(weight, extras={**weight.extras, INPUT_SCALE: scale})
