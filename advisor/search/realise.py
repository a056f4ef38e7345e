"""Turn a chosen assignment into codes: the one function behind finalists and ``apply``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from advisor.calibration.coverage import FittedStatistics
from advisor.calibration.mixing import of_mix, sequence_weights
from advisor.calibration.rotating import rotated
from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.errors import InputError, did_you_mean, join_errors
from advisor.formats.gguf import outer_weights
from advisor.methods.registry import quantize
from advisor.models.allocator import give_back
from advisor.models.inspect import find_outer
from advisor.models.rotation import Rotation, rotation_of
from advisor.search.codes import codes_key
from advisor.search.families import couples_outputs
from advisor.search.outer_codes import check_ends, quantize_outer
from advisor.search.scaling import SCALING_METHODS, Folded, find_scales, stored_dtype
from advisor.search.scores import fits, module_weight
from advisor.search.sequential import QuantizedPrefix, can_be_sequential
from advisor.search.stacking import is_stackable, quantize_group

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
    from advisor.search.codes import CodePool


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
    pool: CodePool | None = None,
) -> Realised:
    """Quantize a model as assigned; equal arguments give equal codes.

    Memory holds one input group's weights and statistics at a time, and its codes; those of the
    whole model with ``pool`` on disk alone.

    Args:
        loaded: The 16-bit model; not modified.
        assignment: Module path to scheme; modules that are absent or 16-bit stay as they are. It
            may name embedding and head too; of a GGUF file without, llama.cpp's rules decide.
        settings: The methods' settings.
        store: Complete statistics; None where no scheme needs any.
        samples: Prefix of the calibration sequences to use; None for all.
        calibration: The sequences themselves, which ``settings.sequential`` needs.
        progress: Called with (input groups done, in all).
        pool: Where the codes go, on disk, beside those of earlier candidates, which are used again
            where they are the same; without, they stay in memory.

    Raises:
        InputError: A module does not exist, a group size does not divide, the linears that share
            an input are only in part AWQ or SmoothQuant, or codes cannot be sequential.
    """
    outer = {module.name: module for module in find_outer(loaded.model)}
    ends = {name: scheme for name, scheme in assignment.items() if name in outer}
    assignment = {name: scheme for name, scheme in assignment.items() if name not in outer}
    _check(loaded, assignment)
    check_ends(ends, outer, settings)
    if store is not None:
        store = of_mix(store, settings.calibration_mix)
    chosen = {name: scheme for name, scheme in assignment.items() if scheme.is_quantized}
    groups: dict[str, list[LinearSpec]] = {}
    for linear in loaded.linears:
        groups.setdefault(linear.input_group, []).append(linear)
    rotation = _rotation(loaded, chosen, settings)
    kept: dict[str, QuantizedWeight] = {}
    replaced: dict[str, Tensor] = {}
    prefix = _prefix(loaded, chosen, settings, store, samples, calibration, rotation)
    known = None
    if store is not None:
        known = partial(FittedStatistics(store, loaded.linears).layer, samples=samples)
    scales: dict[str, Tensor] = {}
    if prefix is None:
        scales = find_scales(
            loaded, chosen, groups, settings, known, partial(module_weight, loaded)
        )
    folded = Folded(loaded, scales)
    alone = prefix is None and rotation is None and not scales
    stored = None if pool is None else pool.candidate(shared=alone)
    weights: Mapping[str, QuantizedWeight] = kept if stored is None else stored
    block = -1
    for done, (group, members) in enumerate(groups.items()):
        units = _units(members, chosen, settings, samples)
        if stored is not None:
            units = [(key, same) for key, same in units if not stored.find(_names(same), key)]
        if alone and not units:  # nothing that reads this input is left to be quantized
            if progress is not None:
                progress(done + 1, len(groups))
            continue
        if prefix is not None:
            entering = members[0].block != block
            behind = {name: folded.tensor(name) for name in folded.names} if entering else {}
            entered = prefix.inputs(members[0], weights, behind)
        statistics: LayerStatistics | None
        if prefix is not None and entered is not None:
            statistics = entered.statistics
        else:
            statistics = None if known is None else known(members[0])
            if rotation is not None and statistics is not None:
                statistics = rotated(rotation, members[0], statistics)
        if members[0].block != block and (prefix is not None or rotation is not None):
            replaced |= _stored(loaded, folded, weights)
            block = members[0].block
            tensors = {} if rotation is None else rotation.block(loaded.linears, block)
            if prefix is not None:
                inside = {key: found for key, found in groups.items() if found[0].block == block}
                scales, tensors = _fit_block(
                    loaded, prefix, chosen, inside, settings, tensors, known
                )
            folded = Folded(loaded, scales, tensors)
        if statistics is not None and group in scales:
            statistics = scale_inputs(statistics, scales[group])
        for key, same in units:
            originals = [folded.weight(linear) for linear in same]
            scheme = chosen[same[0].name]
            if statistics is not None and couples_outputs(scheme, settings):
                each = [_with_gradient(store, statistics, rotation, folded, one) for one in same]
                results = tuple(
                    quantize(weight, own, scheme, settings)
                    for weight, own in zip(originals, each, strict=True)
                )
            else:
                results = _quantize(originals, statistics, scheme, settings)
            for linear, result in zip(same, results, strict=True):
                if stored is None:
                    kept[linear.name] = result
                else:
                    stored.add(linear.name, key, result)
        give_back()
        if progress is not None:
            progress(done + 1, len(groups))
    replaced |= _stored(loaded, folded, weights)
    if rotation is not None:
        dtype = stored_dtype(loaded)
        replaced |= {name: tensor.to(dtype) for name, tensor in rotation.outer().items()}
    for name, scheme in ends.items():
        if not scheme.is_quantized:
            continue
        key = codes_key([name], scheme, settings, samples)
        if stored is not None and stored.find([name], key):
            continue
        found = quantize_outer(loaded, outer[name], scheme, settings, store, samples)
        if stored is None:
            kept[name] = found
        else:
            stored.add(name, key, found)
    replaced |= _gguf_outer(loaded, weights)
    return Realised(weights, replaced)


def _units(
    members: Sequence[LinearSpec],
    chosen: Mapping[str, Scheme],
    settings: QuantizationSettings,
    samples: int | None,
) -> list[tuple[str, list[LinearSpec]]]:
    """Return an input's quantized linears by scheme, each with the key of their codes."""
    by_scheme: dict[Scheme, list[LinearSpec]] = {}
    for linear in members:
        if linear.name in chosen:
            by_scheme.setdefault(chosen[linear.name], []).append(linear)
    return [
        (codes_key(_names(same), scheme, settings, samples), same)
        for scheme, same in by_scheme.items()
    ]


def _names(linears: Sequence[LinearSpec]) -> list[str]:
    return [linear.name for linear in linears]


def _stored(
    loaded: LoadedModel, folded: Folded, weights: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """Return the changed tensors that stay in 16 bits, as a checkpoint stores them."""
    dtype = stored_dtype(loaded)
    return {
        name: folded.tensor(name).to(dtype)
        for name in folded.names
        if name.removesuffix(".weight") not in weights
    }


def _fit_block(
    loaded: LoadedModel,
    prefix: QuantizedPrefix,
    chosen: Mapping[str, Scheme],
    groups: Mapping[str, Sequence[LinearSpec]],
    settings: QuantizationSettings,
    tensors: Mapping[str, Tensor],
    known: Callable[[LinearSpec], LayerStatistics] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a block's scales, and its tensors fitted to the quantized prefix, not scaled yet.

    Args:
        loaded: The 16-bit model; not modified.
        prefix: Has entered the block.
        chosen: Module path to scheme, quantized ones alone.
        groups: The block's input groups.
        settings: The methods' settings.
        tensors: By name, those that a rotation has changed.
        known: Statistics of the unquantized model, for experts.
    """
    own = Folded(loaded, {}, tensors)
    moved: dict[str, Tensor] = {}
    for members in groups.values():
        inputs = prefix.entered(members[0])
        if inputs is None:
            continue
        for linear in members:
            if linear.name in chosen:
                weight = own.weight(linear)
                moved[f"{linear.name}.weight"] = inputs.target(weight, settings.correction)
        inputs.forget()

    def statistics_of(linear: LinearSpec) -> LayerStatistics:
        inputs = prefix.entered(linear)
        if inputs is None and known is not None:
            return known(linear)
        if inputs is None:
            raise InputError("experts need the statistics of the unquantized model.")
        return inputs.statistics

    def weight_of(linear: LinearSpec) -> Tensor:
        found = moved.get(f"{linear.name}.weight")
        return own.weight(linear) if found is None else found

    scales = find_scales(loaded, chosen, groups, settings, statistics_of, weight_of)
    return scales, {**tensors, **moved}


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
            "sequential=True needs gptq, awq or gguf in some module and smoothquant in none, but "
            f"got {', '.join(sorted({scheme.method for scheme in chosen.values()}))}."
        )
    if calibration is None or store is None:
        raise InputError("sequential=True needs the calibration text and its statistics.")
    used = calibration if samples is None else calibration.first(samples)
    shares = sequence_weights(used, settings.calibration_mix)
    kept = shares > 0

    def weights(linear: LinearSpec) -> Tensor:
        """Weigh a token by its sequence's share in the mix and by its gradients."""
        own = store.weights(linear)
        rows = shares[:, None].expand(used.tokens.shape)
        if own is not None:
            rows = rows * own.reshape(-1, rows.shape[1])[: len(rows)]
        return rows[kept]

    return QuantizedPrefix(
        loaded, used.tokens[kept], store.work_folder, settings, weights, rotation
    )


def _with_gradient(
    store: Statistics | None,
    statistics: LayerStatistics,
    rotation: Rotation | None,
    folded: Folded,
    linear: LinearSpec,
) -> LayerStatistics:
    """Return statistics with G of a linear as it is quantized; without, if it took up scales."""
    if store is None or folded.rescales_outputs(linear):
        return replace(statistics, gradient_moment=None)
    found = store.with_gradient(statistics, linear)
    gradient = found.gradient_moment
    if gradient is None or gradient.ndim == 1 or rotation is None:
        return found
    return replace(found, gradient_moment=rotation.gradient_moment(linear, gradient))


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
    if not is_stackable(scheme):
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
