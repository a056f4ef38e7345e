"""Loss of quality from published evidence: an interval for each model and scheme, with sources."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from advisor.engines.rules import read_yaml
from advisor.plan.data import data_folders
from advisor.predict.families import family_of
from advisor.predict.loss_features import (
    bits_class,
    correction_key,
    evidence_key,
    model_features,
    scheme_features,
)

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.modelspec import ModelSpec
    from advisor.schemes import Scheme


_Z90 = 1.645
_SMALL_MODEL, _SPREAD_BELOW = 0.5, 0.8
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
            "low": rounded(self.low),
            "expected": rounded(self.expected),
            "high": rounded(self.high),
            "basis": self.basis,
            "sources": list(self.sources),
            "collapse_risk": rounded(self.collapse_risk),
            "kl": rounded(self.kl),
            "accuracy_drop": rounded(self.accuracy_drop),
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
    # Hardly any table has models below half a billion parameters.
    spread = math.hypot(spread, _SPREAD_BELOW * max(0.0, math.log10(_SMALL_MODEL / billions)))
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


def rounded(value: float) -> float:
    """Round to what JSON holds: two digits more than are shown, lest it is rounded twice."""
    return float(f"{value:.4g}")
