"""Scales of AWQ and SmoothQuant: found for a model's input groups, folded into their producers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.smoothquant import smoothing_scales
from advisor.models.config_file import read_config
from advisor.models.folding import Folding, fold_tensor, foldable_groups, folded_tensors
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


class Folded:
    """The model's tensors after all foldings, made one at a time.

    Attributes:
        names: Of the tensors that the scales change.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        scales: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Find out what changes.

        Args:
            loaded: The 16-bit model; not modified.
            scales: By input group.
            tensors: By name, those that are no longer the model's own; not modified.
        """
        self._loaded = loaded
        self._scales = scales
        self._tensors = tensors or {}
        self._foldings: dict[str, list[Folding]] = {}
        for folding in foldable_groups(loaded.model) if scales else ():
            if folding.input_group in scales:
                for name in _changed(loaded, folding):
                    self._foldings.setdefault(name, []).append(folding)
        self.names = tuple(dict.fromkeys((*self._tensors, *self._foldings)))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, float32; not to be written to."""
        current = self._tensors.get(name)
        if current is None:
            current = _tensor(self._loaded, name)
        for folding in self._foldings.get(name, ()):
            current = fold_tensor(name, current, folding, self._scales[folding.input_group])
        return current

    def rescales_outputs(self, linear: LinearSpec) -> bool:
        """Whether a linear's outputs are divided by the scales of the linear that reads them."""
        foldings = self._foldings.get(f"{linear.name}.weight", ())
        return any(folding.producer == linear.name for folding in foldings)

    def weight(self, linear: LinearSpec) -> Tensor:
        """Return a linear's weight, float32 [out, in]; not to be written to."""
        return self.tensor(f"{linear.name}.weight")


def _changed(loaded: LoadedModel, folding: Folding) -> tuple[str, ...]:
    """Return the names of the tensors that a folding changes."""
    bias = getattr(loaded.model.get_submodule(folding.producer), "bias", None)
    return folded_tensors(folding, producer_has_bias=bias is not None)


def _tensor(loaded: LoadedModel, name: str) -> Tensor:
    """Return one of the model's tensors in float32."""
    return loaded.tensor(name).to(torch.float32)
