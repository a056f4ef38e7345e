"""What the loss model sees of a scheme and of a model; shared by the prediction and the fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from advisor.predict.families import training_tokens
from advisor.schemes import GGUF_BITS_PER_WEIGHT

if TYPE_CHECKING:
    from advisor.schemes import Scheme

GGUF_MIXTURE_BITS: dict[str, float] = {
    "q2_k": 3.0, "q3_k_s": 3.5, "q3_k_m": 3.9, "q3_k_l": 4.2, "q4_0": 4.5, "q4_1": 5.0,
    "q4_k_s": 4.6, "q4_k_m": 4.85, "q5_0": 5.5, "q5_1": 6.0, "q5_k_s": 5.6, "q5_k_m": 5.85,
    "q6_k": 6.5625, "q8_0": 8.5,
}  # fmt: skip
"""Bits per weight of llama.cpp's mixtures, as measured on files of 7B models."""


def model_features(family: str, billions: float, features: dict[str, float]) -> dict[str, float]:
    """Return the features of a model: its size, and how much text it was trained on.

    Models trained on more text use their weights more fully, and lose more by rounding.
    """
    size = math.log10(max(0.03, billions) / 7.0)
    return {
        "log_size": size,
        "log_size*low_bits": size * features["low_bits"],
        "modern": max(0.0, math.log10(training_tokens(family) / 2.0)),
    }


def scheme_features(scheme: Scheme) -> dict[str, float]:
    """Return the regression's features of a scheme.

    Unseen methods borrow from the nearest seen one; ``features_of`` is shared with the fit.
    """
    method = scheme.method
    weight = scheme.weight
    if method == "gguf":
        bits = GGUF_MIXTURE_BITS.get(weight) or GGUF_BITS_PER_WEIGHT[weight]
        return features_of("gguf", bits, 32, None, 16, k_quants="_k" in weight)
    if method == "mixed":
        return features_of("gptq", scheme.bits - 0.2, 128, True, 16)
    activation = {"int8": 8, "fp8": 8.5, "mxfp8": 8.5}.get(scheme.activation or "", 16)
    if scheme.activation in ("nvfp4", "mxfp4"):
        activation = 4
    if method == "llm.int8":
        return features_of("llm.int8", 8, -1, True, 8)
    group = scheme.group_size or (64 if method == "bnb" else -1)
    if scheme.granularity == "tensor":
        group = -2
    method, bits = _evidence_method(scheme)
    if method in ("nvfp4", "mxfp4"):
        group = 16 if method == "nvfp4" else 32
    return features_of(
        method, bits, group, scheme.symmetric, activation, act_order=scheme.activation_order
    )


def _evidence_method(scheme: Scheme) -> tuple[str, float]:
    if scheme.weight in ("fp8", "mxfp8"):
        return "fp8", 8.0
    if scheme.weight in ("nf4", "fp4"):
        return scheme.weight, 4.0
    return scheme.method, scheme.bits


def features_of(
    method: str,
    bits: float,
    group_size: int,
    symmetric: bool | None,
    activation_bits: float,
    *,
    act_order: bool = False,
    k_quants: bool = False,
) -> dict[str, float]:
    """Return the features of one table cell or scheme.

    Args:
        method: ``rtn``, ``gptq``, ``awq``, ``hqq``, ``gguf``, ``nf4``, ...
        bits: Bits per weight; of GGUF with its scales.
        group_size: Weights that share a scale; -1 per channel, -2 per tensor.
        symmetric: Whether there is no zero point; None where the type decides.
        activation_bits: 16, 8 (INT8), 8.5 (FP8) or 4.
        act_order: GPTQ's act-order.
        k_quants: GGUF's k-quants rather than its older types.
    """
    unsmoothed = activation_bits == 8 and method in ("rtn", "gptq")
    if unsmoothed:
        # INT8 products are one method with or without smoothing: nearly all cells are smoothed.
        method = "smoothquant"
    low = max(0.0, 4.0 - bits)
    high = max(0.0, bits - 4.0)
    features = {
        "intercept": 1.0,
        "low_bits": low,
        "very_low_bits": max(0.0, 3.0 - bits),
        "high_bits": high,
        f"method:{method}": 1.0,
        f"low_bits*{method}": low,
        "act_order": float(act_order),
        "unsmoothed": float(unsmoothed),
    }
    if group_size < 0:
        features["per_channel"] = 1.0
        features["per_channel*low_bits"] = low
        rounding = float(method in ("rtn", "hqq"))
        features["per_channel*rounding"] = rounding
        features["per_channel*rounding*low_bits"] = rounding * min(1.0, low)
        features["per_tensor"] = float(group_size == -2)
    elif method not in ("gguf", "nf4", "fp4", "nvfp4", "mxfp4"):
        features["log_group"] = math.log2(group_size / 128)
        features["log_group*low_bits"] = math.log2(group_size / 128) * low
    if symmetric is not None:
        features["symmetric"] = 0.5 if symmetric else -0.5
        if group_size < 0:
            features["symmetric*per_channel"] = features["symmetric"]
    if activation_bits < 16:
        key = {8: "activation:int8", 8.5: "activation:fp8"}.get(activation_bits, "activation:4bit")
        features[key] = 1.0
    if k_quants:
        features["k_quants"] = 1.0
    return features


def correction_key(family: str, key: str, features: dict[str, float]) -> str:
    """Return the key of a family's correction."""
    return f"{family} {key} {'channel' if 'per_channel' in features else 'group'}"


def bits_class(scheme: Scheme) -> str:
    """Return the class of bits that the residual spread is told by: ``2``, ``3``, ``4``, ``8``."""
    bits = scheme.bits
    return "2" if bits < 2.75 else "3" if bits < 3.75 else "4" if bits < 5 else "8"


def evidence_key(scheme: Scheme) -> str:
    """Return the key of the evidence's sources for a scheme."""
    method = _evidence_method(scheme)[0]
    if scheme.activation == "int8" and method in ("rtn", "gptq"):
        method = "smoothquant"
    return f"{method}:{bits_class(scheme)}"
