"""Scales of AWQ and SmoothQuant: found for a model's input groups, folded into their producers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.smoothquant import smoothing_scales
from advisor.models.folding import Folding, fold_scales, foldable_groups
from advisor.models.load import read_config
from advisor.search.stacking import awq_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

SCALING_METHODS = frozenset({"awq", "smoothquant"})
"""Methods whose scales fold into the layer before."""


def find_scales(
    loaded: LoadedModel,
    chosen: Mapping[str, Scheme],
    groups: Mapping[str, Sequence[LinearSpec]],
    settings: QuantizationSettings,
    statistics_of: Callable[[LinearSpec], LayerStatistics] | None,
    weight_of: Callable[[LinearSpec], Tensor],
) -> dict[str, Tensor]:
    """Return the scales of AWQ and SmoothQuant by input group.

    Groups whose scales fold into nothing keep their inputs, as in the libraries.

    Args:
        loaded: The 16-bit model.
        chosen: Module path to scheme, quantized ones alone.
        groups: The input groups in question and their linears.
        settings: The methods' settings.
        statistics_of: Returns a linear's statistics; None where there are none.
        weight_of: Returns its weight, before any scales.

    Raises:
        InputError: The linears that share an input are only in part of one of the methods, or
            there are no statistics.
    """
    result: dict[str, Tensor] = {}
    for folding in foldable_groups(loaded.model):
        members = groups.get(folding.input_group, ())
        present = [chosen[linear.name] for linear in members if linear.name in chosen]
        scaling = [scheme for scheme in present if scheme.method in SCALING_METHODS]
        if not scaling:
            continue
        method = scaling[0].method
        having = [scheme for scheme in scaling if scheme.method == method]
        if len(having) < len(members):
            raise InputError(
                f"linears that share an input take {method} together, but of {folding.input_group} "
                f"only {len(having)} of {len(members)} have it."
            )
        if statistics_of is None:
            raise InputError(f"{method} needs calibration statistics, but there are none.")
        weights = [weight_of(linear) for linear in members]
        statistics = statistics_of(members[0])
        if method == "awq":
            # Where the engine does not fuse them, members may differ in bits: the coarsest decides.
            coarsest = min(having, key=lambda scheme: scheme.bits)
            scales = awq_scales(weights, statistics, coarsest, settings)
        else:
            scales = smoothing_scales(weights, statistics, settings)
        result[folding.input_group] = _as_stored(loaded, folding, scales)
    return result


def _as_stored(loaded: LoadedModel, folding: Folding, scales: Tensor) -> Tensor:
    """Return the scales that a norm really takes up once it is rounded to its stored type.

    The linears are multiplied by these, so that rounding the norm changes nothing.
    """
    if folding.producer_kind != "norm":
        return scales
    norm = _tensor(loaded, f"{folding.producer}.weight") + folding.norm_offset
    stored = (norm / scales - folding.norm_offset).to(stored_dtype(loaded)).float()
    exact = norm / (stored + folding.norm_offset)
    usable = exact.isfinite() & (exact > 0)
    return torch.where(usable, exact, scales)


def stored_dtype(loaded: LoadedModel) -> torch.dtype:
    """Return the data type of the checkpoint's own tensors, whatever the model computes in."""
    config = read_config(loaded.folder)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else loaded.dtype


def fold(
    loaded: LoadedModel, scales: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return every tensor that the scales change, float32, all foldings applied.

    Args:
        loaded: The 16-bit model; not modified.
        scales: By input group.
        tensors: By name, those that are no longer the model's own; not modified, and returned too.
    """
    changed: dict[str, Tensor] = dict(tensors or {})
    for folding in foldable_groups(loaded.model):
        if folding.input_group not in scales:
            continue
        names = [f"{linear}.weight" for linear in folding.linears] + _producer_tensors(
            loaded, folding
        )
        current = {name: changed.get(name, _tensor(loaded, name)) for name in names}
        changed.update(fold_scales(current, folding, scales[folding.input_group]))
    return changed


def _producer_tensors(loaded: LoadedModel, folding: Folding) -> list[str]:
    """Return the producer's tensor names."""
    bias = getattr(loaded.model.get_submodule(folding.producer), "bias", None)
    return [f"{folding.producer}.weight"] + ([] if bias is None else [f"{folding.producer}.bias"])


def _tensor(loaded: LoadedModel, name: str) -> Tensor:
    """Return one of the model's tensors in float32."""
    return loaded.model.get_parameter(name).detach().to(torch.float32)
