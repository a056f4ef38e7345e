"""LLM.int8(): bitsandbytes' row-wise int8 weights; outliers are split off at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight, refuse_lost
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize every row to -127..127 with its absolute maximum, through bitsandbytes.

    Args:
        weight: Shape [out, in], any floating type; not modified. As in bitsandbytes it is rounded
            to float16 first.
        statistics: Not used.
        scheme: ``llm.int8``.
        settings: Not used: bitsandbytes stores float32 scales.

    Returns:
        Codes with zero point 128; ``extras["SCB"]`` holds the row maxima, float32 [out], as the
        checkpoint stores them; scales are those divided by 127.

    Raises:
        InputError: The weight cannot be used, or is too large or small for float16.

    Reference: LLM.int8(), arXiv:2208.07339, section 3.1 (vector-wise quantization).

    Differs from the paper: the mixed-precision decomposition (section 3.2) acts on the inputs, so
    it is part of the arithmetic at run time; all columns of the weight are stored in int8.
    """
    from bitsandbytes import functional

    # Its functions for the CPU, so that codes do not depend on where the weight is.
    values = prepare_weight(weight, [scheme])
    half = values.cpu().to(torch.float16).contiguous()
    if not bool(torch.isfinite(half).all()):
        raise InputError(
            "LLM.int8() rounds weights to float16, but some are above 65504. Use rtn-int8-gch-sym."
        )
    refuse_lost(
        values, lambda: half.float().to(values.device), "LLM.int8() rounds weights to float16",
        "Use rtn-int8-gch-sym.",
    )  # fmt: skip
    signed, maxima, _ = functional.int8_vectorwise_quant(half)
    maxima = maxima.to(torch.float32)
    # A row of zeros divides 0 by 0 there; what that casts to is not defined.
    signed = torch.where(maxima.unsqueeze(1) > 0, signed, torch.zeros_like(signed))
    return QuantizedWeight(
        scheme=scheme,
        codes=(signed.to(torch.int16) + 128).to(torch.uint8),
        scales=(maxima / 127.0).unsqueeze(1),
        extras={"SCB": maxima},
    ).to(weight.device)
