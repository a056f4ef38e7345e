"""Loss of quality from published evidence: an interval for each model and scheme, with sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from advisor.engines.rules import read_yaml
from advisor.plan.data import data_folders
from advisor.predict.families import family_of, training_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.modelspec import ModelSpec
    from advisor.schemes import Scheme

GGUF_MIXTURE_BITS: dict[str, float] = {
    "q2_k": 3.0, "q3_k_s": 3.5, "q3_k_m": 3.9, "q3_k_l": 4.2, "q4_0": 4.5, "q4_1": 5.0,
    "q4_k_s": 4.6, "q4_k_m": 4.85, "q5_0": 5.5, "q5_1": 6.0, "q5_k_s": 5.6, "q5_k_m": 5.85,
    "q6_k": 6.5625, "q8_0": 8.5,
}  # fmt: skip
"""Bits per weight of llama.cpp's mixtures, as measured on files of 7B models."""

_Z90 = 1.645
_LARGEST = 1e6
"""Losses are cut here: beyond it a model is noise and the number means nothing."""
_NOISE = 0.003
"""Published cells of the same model and scheme differ by about this much of perplexity."""


@dataclass(frozen=True, slots=True)
class LossEstimate:
    """Predicted loss of quality.

    Attributes:
        low: Lower end of the 90% interval of the relative perplexity increase.
        expected: Its median.
        high: Upper end.
        collapse_risk: Probability that perplexity rises by more than half.
        kl: Mean KL divergence per token that goes with ``expected``, nats.
        accuracy_drop: Drop of average task accuracy, as a fraction (0.01 = one point).
        accuracy_drop_high: Upper end of its 90% interval.
        basis: ``evidence``, or ``calculated`` for 16-bit schemes, which lose nothing.
        sources: Published tables that carried most weight.
        known_family: Whether the model's family is in the evidence.
    """

    low: float
    expected: float
    high: float
    collapse_risk: float
    kl: float
    accuracy_drop: float
    accuracy_drop_high: float
    basis: str
    sources: tuple[str, ...]
    known_family: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the ``loss`` object of a candidate's JSON."""
        return {
            "low": _round(self.low),
            "expected": _round(self.expected),
            "high": _round(self.high),
            "basis": self.basis,
            "sources": list(self.sources),
            "collapse_risk": _round(self.collapse_risk),
            "kl": _round(self.kl),
            "accuracy_drop": _round(self.accuracy_drop),
        }


@dataclass(frozen=True, slots=True)
class LossModel:
    """Coefficients of the regression of log(log(perplexity ratio)); see ``loss.yaml``."""

    coefficients: dict[str, float]
    families: dict[str, float]
    residual: dict[str, float]
    family_spread: float
    collapse_threshold: float
    kl_per_loss: float
    accuracy_per_loss: dict[str, float]
    sources: dict[str, tuple[str, ...]]
    corrections: dict[str, float]
    """What a family's own cells of one method and bit width say beyond the regression."""


def predict_loss(spec: ModelSpec, scheme: Scheme) -> LossEstimate:
    """Predict what a scheme costs in quality, before anything is measured.

    Args:
        spec: The model; its architecture and configuration tell the family.
        scheme: The scheme of all its linears.
    """
    return estimate_loss(family_of(spec), spec.parameters / 1e9, scheme)


def estimate_loss(family: str, billions: float, scheme: Scheme) -> LossEstimate:
    """Predict the loss from a family's name and a size in 10^9 parameters."""
    if not scheme.is_quantized:
        return LossEstimate(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, "calculated", (), True)
    model = load_loss_model()
    known = family in model.families
    center = model.families.get(family, 0.0)
    features = scheme_features(scheme)
    center += linear_predictor(model, family, billions, features)
    center += model.corrections.get(correction_key(family, evidence_key(scheme), features), 0.0)
    spread = model.residual[bits_class(scheme)]
    if not known:
        spread = math.hypot(spread, model.family_spread)
    ends = [_to_loss(center + z * spread) for z in (-_Z90, 0.0, _Z90)]
    limit = math.log(math.log1p(model.collapse_threshold))
    risk = 0.5 * math.erfc((limit - center) / (spread * math.sqrt(2)))
    drop, drop_high = (_accuracy(model, math.log1p(loss)) for loss in (ends[1], ends[2]))
    return LossEstimate(
        low=ends[0],
        expected=ends[1],
        high=max(ends[2], _NOISE),
        collapse_risk=risk,
        kl=model.kl_per_loss * math.log1p(ends[1]),
        accuracy_drop=drop,
        accuracy_drop_high=drop_high,
        basis="evidence",
        sources=model.sources.get(evidence_key(scheme), ()),
        known_family=known,
    )


def linear_predictor(
    model: LossModel, family: str, billions: float, features: dict[str, float]
) -> float:
    """Return the expected log(log(perplexity ratio)) without the family's own effect."""
    values = {**features, **model_features(family, billions, features)}
    return sum(model.coefficients.get(name, 0.0) * value for name, value in values.items())


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
        return features_of("gguf", GGUF_MIXTURE_BITS[weight], 32, None, 16, k_quants="_k" in weight)
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


def load_loss_model() -> LossModel:
    """Return the fitted model; a user's ``evidence/loss.yaml`` replaces the shipped one."""
    return _load(data_folders("evidence"))


@lru_cache(maxsize=4)
def _load(folders: tuple[Path, ...]) -> LossModel:
    path = [folder / "loss.yaml" for folder in folders if (folder / "loss.yaml").is_file()][-1]
    return loss_model(read_yaml(path))


def loss_model(document: dict[str, Any]) -> LossModel:
    """Build the model from the document in ``loss.yaml``."""
    sources = {
        key: tuple(document["source_names"][index] for index in indices)
        for key, indices in document["sources"].items()
    }
    return LossModel(
        coefficients=document["coefficients"],
        families=document["families"],
        residual=document["residual"],
        family_spread=document["family_spread"],
        collapse_threshold=document["collapse_threshold"],
        kl_per_loss=document["kl_per_loss"],
        accuracy_per_loss=document["accuracy_per_loss"],
        sources=sources,
        corrections=document["corrections"],
    )


def _to_loss(value: float) -> float:
    # Beyond a ratio of e^14 the published numbers are noise themselves.
    ratio = math.exp(min(value, math.log(13.8)))
    return min(_LARGEST, math.expm1(ratio))


def _accuracy(model: LossModel, log_ratio: float) -> float:
    """Return the drop in accuracy for a log perplexity ratio: linear first, then saturating."""
    slope, most = model.accuracy_per_loss["slope"], model.accuracy_per_loss["most"]
    return most * -math.expm1(-slope * log_ratio / most)


def _round(value: float) -> float:
    return float(f"{value:.3g}")
