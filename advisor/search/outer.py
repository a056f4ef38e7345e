"""Embedding and head as options of the knapsack: what each scheme does to them.

Scores are summed over the rows (tokens of the vocabulary) that matter most and a sample of the
others. What the statistics mean is said in :mod:`advisor.calibration.outer`. Where one tensor is
both embedding and head, its score is the sum of both roles.

Measured on SmolLM2-135M (re-parameterised, tied; 16x64 calibration and 24x64 evaluation tokens of
the built-in text), the embedding alone in a GGUF type and all linears in 16 bits, KL in nats:

    type      predicted   measured
    q5_0      0.0117      0.0125 [0.0094, 0.0156]
    iq4_nl    0.0346      0.0375 [0.0309, 0.0441]

With everything quantized and nothing searched, on the same texts: all linears iq4_nl and the
embedding q8_0, as llama.cpp has it, 0.0835 [0.0735, 0.0935] in 91.7 MB; feed-forward q5_0,
attention iq4_nl and embedding q5_0, 0.0748 [0.0671, 0.0825] in 91.1 MB.

And on the small trained model, mixtures of GGUF types for llama.cpp in as many bytes (16x128 and
32x128 tokens), with the embedding in llama.cpp's own type (q6_k) and in one of the knapsack's:

    1.30 MB    0.0177    0.0127 (q5_k)
    1.42 MB    0.0074    0.0064 (q5_k)
    1.56 MB    0.00283   0.00276 (q6_k, fitted to its importance)
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from advisor.calibration.mixing import of_mix
from advisor.methods.registry import quantize
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json
from advisor.search.families import is_measured_alone, own_settings, relevant_settings
from advisor.search.outer_codes import fitting_statistics, outer_weight, role_statistics
from advisor.search.score import Score, score_change
from advisor.search.scores import fits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec.outer import OuterModule
    from advisor.schemes import Scheme

_VERSION = 4
"""Part of every cache key: raised when scores mean something else."""
_SCORED_WEIGHTS = 1 << 23
_logger = logging.getLogger(__name__)


def rows_to_score(weights: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return rows that stand for all, and how often each counts.

    Half are those of largest weight; the rest is spread evenly over the others, which count as
    many times as makes up for those left out.

    Args:
        weights: Of the rows in the score, float32 [rows], not negative.
        most: Rows that may be chosen.

    Returns:
        Indices, int64 [chosen], ascending by weight; factors, float32 [chosen].
    """
    order = torch.argsort(weights, descending=True, stable=True)
    if len(order) <= most:
        return order, torch.ones(len(order), device=order.device)
    large, small = order[: most // 2], order[most // 2 :]
    places = torch.linspace(0, len(small) - 1, most - most // 2).round().long()
    sampled = small[places.to(small.device)]
    total, seen = float(weights[small].sum()), float(weights[sampled].sum())
    factor = total / seen if seen > 0 else 1.0
    factors = torch.cat([torch.ones(len(large)), torch.full((len(sampled),), factor)])
    return torch.cat([large, sampled]), factors.to(weights.device)


class OuterBook:
    """Scores of embedding and head by scheme and settings, kept on disk by content."""

    def __init__(
        self,
        loaded: LoadedModel,
        store: Statistics,
        folder: Path,
        modules: Sequence[OuterModule],
        fitted_samples: int | None,
    ) -> None:
        """Open the book.

        Args:
            loaded: The 16-bit model.
            store: Its complete statistics.
            folder: Where scores are kept.
            modules: What is to be quantized.
            fitted_samples: Sequences that codes are fitted to for scoring; the rest judge. None:
                no such split.
        """
        self.modules = tuple(modules)
        self._loaded = loaded
        self._store = store
        self._folder = folder
        self._fitted_samples = fitted_samples
        self._known: dict[str, Score] = {}

    def score(
        self,
        module: OuterModule,
        scheme: Scheme,
        settings: QuantizationSettings,
        samples: int | None,
    ) -> Score:
        """Return what a scheme does to a module, computing it where it is not known.

        Args:
            module: One of :attr:`modules`.
            scheme: 16-bit ones score zero.
            settings: The methods' settings.
            samples: Prefix of the calibration sequences that codes are fitted to; None for all.
        """
        if not scheme.is_quantized:
            return Score(0, 0)
        settings = replace(settings, descent=0, output_feedback=0.0)  # as for the linears
        settings = own_settings(scheme, settings)
        limit = self._fitted_samples
        if limit is not None:
            samples = limit if samples is None else min(samples, limit)
        key = sha256_json(
            {
                "version": _VERSION,
                "statistics": self._store.key,
                "module": module.name,
                "scheme": str(scheme),
                "settings": relevant_settings(scheme, settings, samples),
            }
        )
        if key not in self._known:
            path = self._folder / f"{key}.json"
            found = _read(path)
            if found is None:
                found = self._compute(module, scheme, settings, samples)
                self._folder.mkdir(parents=True, exist_ok=True)
                document = {"scheme": str(scheme), "module": module.name}
                write_atomically(path, json.dumps({**document, "score": [found.kl, found.error]}))
            self._known[key] = found
        return self._known[key]

    def _compute(
        self,
        module: OuterModule,
        scheme: Scheme,
        settings: QuantizationSettings,
        samples: int | None,
    ) -> Score:
        judges = self._judges(module)
        importance = sum(
            (part.gradient_moment for part in judges if part.gradient_moment is not None),
            torch.zeros(module.linear.out_features, device=self._loaded.device),
        )
        most = max(1, _SCORED_WEIGHTS // module.linear.in_features)
        rows, factors = rows_to_score(importance, most)
        weight = outer_weight(self._loaded, module.linear, rows)
        fitted = fitting_statistics(
            role_statistics(
                self._loaded, of_mix(self._store, settings.calibration_mix), module, samples
            )
        )
        delta = quantize(weight, fitted, scheme, settings).dequantize() - weight
        kl = error = 0.0
        for part in judges:
            gradient = part.gradient_moment
            own = None if gradient is None else gradient[rows] * factors
            found = score_change(delta, replace(part, gradient_moment=own))
            kl, error = kl + found.kl, error + found.error
        return Score(kl, error)

    def _judges(self, module: OuterModule) -> list[LayerStatistics]:
        """Return the statistics of the sequences that codes for scoring are not fitted to."""
        whole = role_statistics(self._loaded, self._store, module)
        if self._fitted_samples is None:
            return whole
        half = role_statistics(self._loaded, self._store, module, self._fitted_samples)
        return [
            replace(
                all_,
                second_moment=all_.second_moment - first.second_moment,
                tokens=all_.tokens - first.tokens,
                moment_weight=None if all_.moment_weight is None else all_.rows - first.rows,
            )
            for all_, first in zip(whole, half, strict=True)
        ]


def outer_schemes(module: OuterModule, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
    """Return what a module may take of the schemes that the linears may.

    GGUF files name a type in any case; elsewhere 16 bits are among the choices. AWQ's scales have
    nothing to fold into, so that its codes are rounded ones. No engine is known to read other types
    than integers there, or to round what a head reads.
    """
    found = []
    for scheme in schemes:
        if is_measured_alone(scheme):
            continue
        if scheme.method == "awq":
            scheme = replace(scheme, method="rtn")
        if fits(scheme, module.linear):
            found.append(scheme)
    if any(scheme.method == "gguf" for scheme in found):
        found = [scheme for scheme in found if scheme.is_quantized]
    return tuple(dict.fromkeys(found))


def _read(path: Path) -> Score | None:
    """Return a score from disk; None where there is none."""
    try:
        kl, error = json.loads(path.read_text(encoding="utf-8"))["score"]
        return Score(float(kl), float(error))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        _logger.warning("the score in %s is damaged and will be computed again", path)
        return None
