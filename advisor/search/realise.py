"""Turn a chosen assignment into codes: the one function behind finalists and ``apply``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from advisor.calibration.mixing import of_mix, sequence_weights
from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.errors import InputError, did_you_mean, join_errors
from advisor.formats.gguf import outer_weights
from advisor.methods.registry import quantize
from advisor.methods.smoothquant import smoothing_scales
from advisor.models.folding import Folding, fold_scales, foldable_groups
from advisor.models.load import read_config
from advisor.models.rotation import Rotation, rotation_of
from advisor.search.scores import fits, module_weight, rotated
from advisor.search.sequential import SCALING_METHODS, QuantizedPrefix, can_be_sequential
from advisor.search.stacking import awq_scales, is_stackable, quantize_group

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class Realised:
    """A model's quantized weights.

    Attributes:
        weights: Module path to its codes.
        replaced: Tensor name to its new value, for 16-bit tensors that took up the scales of AWQ
            or SmoothQuant, in the checkpoint's data type.
    """

    weights: Mapping[str, QuantizedWeight]
    replaced: Mapping[str, Tensor] = field(default_factory=dict)


def realise(
    loaded: LoadedModel,
    assignment: Mapping[str, Scheme],
    settings: QuantizationSettings,
    store: Statistics | None,
    *,
    samples: int | None = None,
    calibration: TokenSequences | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Realised:
    """Quantize a model as assigned; equal arguments give equal codes.

    Args:
        loaded: The 16-bit model; not modified.
        assignment: Module path to scheme; modules that are absent or 16-bit stay as they are.
        settings: The methods' settings.
        store: Complete statistics; None where no scheme needs any.
        samples: Prefix of the calibration sequences to use; None for all.
        calibration: The sequences themselves, which ``settings.sequential`` needs.
        progress: Called with (input groups done, in all).

    Raises:
        InputError: A module does not exist, a group size does not divide, the linears that share
            an input are only in part AWQ or SmoothQuant, or codes cannot be sequential.
    """
    _check(loaded, assignment)
    if store is not None:
        store = of_mix(store, settings.calibration_mix)
    chosen = {name: scheme for name, scheme in assignment.items() if scheme.is_quantized}
    groups: dict[str, list[LinearSpec]] = {}
    for linear in loaded.linears:
        groups.setdefault(linear.input_group, []).append(linear)
    rotation = _rotation(loaded, chosen, settings)
    scales = _all_scales(loaded, chosen, groups, settings, store, samples)
    tensors = _fold(loaded, scales) if rotation is None else rotation.tensors(loaded.linears)
    weights: dict[str, QuantizedWeight] = {}
    prefix = _prefix(loaded, chosen, settings, store, samples, calibration, rotation)
    for done, (group, members) in enumerate(groups.items()):
        if prefix is not None:
            inputs = prefix.inputs(members[0], weights)
            statistics: LayerStatistics | None = inputs.statistics
        else:
            statistics = None if store is None else store.layer(members[0], samples)
            if rotation is not None and statistics is not None:
                statistics = rotated(rotation, members[0], statistics)
        if statistics is not None and group in scales:
            statistics = scale_inputs(statistics, scales[group])
        quantized = [linear for linear in members if linear.name in chosen]
        for scheme in dict.fromkeys(chosen[linear.name] for linear in quantized):
            same = [linear for linear in quantized if chosen[linear.name] == scheme]
            originals = [
                tensors.get(f"{linear.name}.weight", module_weight(loaded, linear))
                for linear in same
            ]
            if prefix is not None:
                originals = [inputs.target(weight, settings.correction) for weight in originals]
            results = _quantize(originals, statistics, scheme, settings)
            weights.update(zip((linear.name for linear in same), results, strict=True))
        if progress is not None:
            progress(done + 1, len(groups))
    dtype = stored_dtype(loaded)
    replaced = {
        name: tensor.to(dtype)
        for name, tensor in tensors.items()
        if name.removesuffix(".weight") not in weights
    }
    replaced |= _gguf_outer(loaded, weights)
    return Realised(weights, replaced)


def _rotation(
    loaded: LoadedModel, chosen: Mapping[str, Scheme], settings: QuantizationSettings
) -> Rotation | None:
    """Return the rotation that the settings ask for."""
    rotation = rotation_of(loaded.model, settings.rotation, settings.rotation_seed)
    unfit = {s.method for s in chosen.values()} & (SCALING_METHODS | {"gguf"})
    if rotation is not None and unfit:
        raise InputError(
            f"rotation={settings.rotation!r} goes with methods that fold no scales and with "
            f"safetensors checkpoints, but got {', '.join(sorted(unfit))}."
        )
    return rotation


def _prefix(
    loaded: LoadedModel,
    chosen: Mapping[str, Scheme],
    settings: QuantizationSettings,
    store: Statistics | None,
    samples: int | None,
    calibration: TokenSequences | None,
    rotation: Rotation | None,
) -> QuantizedPrefix | None:
    """Return the walk over quantized blocks, where the settings ask for it."""
    if not settings.sequential:
        return None
    if not can_be_sequential(chosen):
        raise InputError(
            "sequential=True needs gptq in some module and awq or smoothquant in none, but got "
            f"{', '.join(sorted({scheme.method for scheme in chosen.values()}))}."
        )
    if calibration is None or store is None:
        raise InputError("sequential=True needs the calibration text and its statistics.")
    used = calibration if samples is None else calibration.first(samples)
    weights = sequence_weights(used, settings.calibration_mix)
    kept = weights > 0
    return QuantizedPrefix(
        loaded, used.tokens[kept], store.work_folder, settings, weights[kept], rotation
    )


def _gguf_outer(loaded: LoadedModel, weights: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Return embedding and head as a GGUF file will hold them; nothing for other formats."""
    if not any(weight.scheme.method == "gguf" for weight in weights.values()):
        return {}
    parameters = dict(loaded.model.named_parameters())
    found = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in parameters]
    outer = outer_weights(
        ((name, parameters[name]) for name in found), weights, tied="lm_head.weight" not in found
    )
    return {name: weight.dequantize() for name, weight in outer}


def _quantize(
    weights: Sequence[Tensor],
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> tuple[QuantizedWeight, ...]:
    """Quantize (already folded) weights that share an input."""
    if statistics is None or not is_stackable(scheme):
        return tuple(quantize(weight, statistics, scheme, settings) for weight in weights)
    return quantize_group(weights, statistics, [scheme], settings, foldable=False)[0].weights


def _check(loaded: LoadedModel, assignment: Mapping[str, Scheme]) -> None:
    """Refuse modules that do not exist and groups that do not divide, all at once."""
    linears = {linear.name: linear for linear in loaded.linears}
    problems = [
        f"the model has no linear {name!r}.{did_you_mean(name, linears)}"
        for name in assignment.keys() - linears.keys()
    ]
    problems += [
        f"group_size must divide in_features, but got group_size={scheme.group_size} for {name} "
        f"with in_features={linears[name].in_features}."
        for name, scheme in assignment.items()
        if name in linears and not fits(scheme, linears[name])
    ]
    if problems:
        raise InputError(join_errors(sorted(problems)))


def _all_scales(
    loaded: LoadedModel,
    chosen: Mapping[str, Scheme],
    groups: Mapping[str, Sequence[LinearSpec]],
    settings: QuantizationSettings,
    store: Statistics | None,
    samples: int | None,
) -> dict[str, Tensor]:
    """Return the scales of AWQ and SmoothQuant by input group, from the original weights.

    Groups whose scales fold into nothing keep their inputs, as in the libraries.
    """
    result: dict[str, Tensor] = {}
    for folding in foldable_groups(loaded.model):
        members = groups[folding.input_group]
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
        if store is None:
            raise InputError(f"{method} needs calibration statistics, but there are none.")
        weights = [module_weight(loaded, linear) for linear in members]
        statistics = store.layer(members[0], samples)
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


def _fold(loaded: LoadedModel, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor that the scales change, float32, all foldings applied."""
    changed: dict[str, Tensor] = {}
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
