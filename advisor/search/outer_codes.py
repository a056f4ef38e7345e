"""Codes of embedding and head, and the statistics that they are fitted to.

A head or an embedding has as many rows as the vocabulary: codes are made some rows at a time, as
rows do not depend on each other. Where one tensor is both, codes are fitted to the sum of both
roles' second moments, each as it weighs in the score.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError, join_errors
from advisor.methods.registry import quantize
from advisor.models.casting import casting_of
from advisor.models.device import CPU
from advisor.models.inspect import outer_specs
from advisor.search.families import own_settings
from advisor.search.scores import fits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

_WEIGHTS_AT_ONCE = 1 << 24


def role_statistics(
    loaded: LoadedModel,
    store: Statistics,
    module: OuterModule,
    samples: int | None = None,
) -> list[LayerStatistics]:
    """Return the statistics of each role that a module has: the head's, the embedding's, or both.

    Args:
        loaded: The 16-bit model.
        store: Complete statistics, with gradients.
        module: The embedding or the head.
        samples: Prefix of the calibration sequences; gradients are always those of all.
    """
    head, embedding = outer_specs(loaded.model)
    found = []
    if module.tied or module.role == "head":
        found.append(store.layer(head, samples))
    if module.role == "embedding":
        seen = store.layer(embedding, samples)
        shares = seen.gradient_moment
        if shares is not None:
            # Of |g|² each token has its share; all shares together count as one token's weight.
            shares = shares * (max(1, seen.gradient_tokens) / float(shares.sum().clamp_min(1e-30)))
        found.append(replace(seen, gradient_moment=shares))
    return found


def fitting_statistics(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return the statistics that codes are fitted to: one role's own, or the sum of both.

    A role's mean second moment counts by the sum of its rows' weights in the score.
    """
    # Rows make up for each other by whole gradient moments alone, which no vocabulary has.
    first = replace(parts[0], gradient_tokens=0, gradient_moment=None)
    if len(parts) == 1:
        return first
    moment = torch.zeros_like(first.second_moment)
    for part in parts:
        weights = part.gradient_moment
        share = 1.0
        if weights is not None:
            share = float(weights.sum()) / max(1, part.gradient_tokens)
        moment += part.second_moment * (share / max(part.rows, 1e-30))
    return replace(first, second_moment=moment * first.tokens, moment_weight=None)


def outer_weight(loaded: LoadedModel, linear: LinearSpec, rows: Tensor | slice) -> Tensor:
    """Return some rows of an embedding's or head's 16-bit weight, float32, on the device."""
    casting = casting_of(loaded.model)
    parameter = loaded.model.get_parameter(f"{linear.name}.weight")
    chosen = rows if isinstance(rows, slice) else rows.cpu()
    found = casting.stored(parameter)[chosen].to(casting.device).float()
    casting.release(parameter)
    return found


def quantize_outer(
    loaded: LoadedModel,
    module: OuterModule,
    scheme: Scheme,
    settings: QuantizationSettings,
    store: Statistics | None,
    samples: int | None,
) -> QuantizedWeight:
    """Return the codes of an embedding or a head, in host memory.

    Args:
        loaded: The 16-bit model.
        module: Which end.
        scheme: A quantized one.
        settings: The methods' settings.
        store: Complete statistics of the unquantized model, also for sequential codes; None where
            the scheme needs none.
        samples: Prefix of the calibration sequences; None for all.
    """
    statistics = None
    if store is not None:
        statistics = fitting_statistics(role_statistics(loaded, store, module, samples))
    height, width = module.linear.out_features, module.linear.in_features
    at_once = max(1, _WEIGHTS_AT_ONCE // width) if _has_separate_rows(scheme) else height
    parts = [
        quantize(
            outer_weight(loaded, module.linear, slice(start, start + at_once)),
            statistics, scheme, own_settings(scheme, settings),
        ).to(CPU)
        for start in range(0, height, at_once)
    ]  # fmt: skip
    return parts[0] if len(parts) == 1 else _joined(parts)


def _has_separate_rows(scheme: Scheme) -> bool:
    """Whether all that is stored of a row depends on that row alone."""
    integer = scheme.is_integer and scheme.method in ("rtn", "gptq")
    return scheme.method == "gguf" or (integer and scheme.activation is None)


def _joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Put rows together that were quantized apart."""
    first = parts[0]
    zero_points = None
    if first.zero_points is not None:
        zero_points = torch.cat(
            [part.zero_points for part in parts if part.zero_points is not None]
        )
    extras = {
        name: torch.cat([part.extras[name] for part in parts]) if value.ndim == 2 else value
        for name, value in first.extras.items()
    }
    return replace(
        first,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zero_points=zero_points,
        extras=extras,
    )


def check_ends(
    ends: Mapping[str, Scheme], outer: Mapping[str, OuterModule], settings: QuantizationSettings
) -> None:
    """Refuse what embedding and head cannot take.

    Args:
        ends: Their schemes, by module path.
        outer: What the model has.
        settings: The methods' settings.

    Raises:
        InputError: Groups do not divide the columns, or a rotation would change the weights.
    """
    quantized = {name: scheme for name, scheme in ends.items() if scheme.is_quantized}
    problems = [
        f"{scheme} does not divide the {outer[name].linear.in_features} columns of {name}: use "
        "a smaller group, or keep it in 16 bits."
        for name, scheme in quantized.items()
        if not fits(scheme, outer[name].linear)
    ]
    if quantized and settings.rotation != "none":
        problems.append(
            f"rotation={settings.rotation!r} changes embedding and head, which are to be "
            f"quantized ({', '.join(quantized)}): use rotation='none'."
        )
    if problems:
        raise InputError(join_errors(problems))
