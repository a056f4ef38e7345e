"""Turn a chosen assignment into codes: the one function behind finalists and ``apply``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.formats.gguf import outer_kind, outer_weights
from advisor.models.inspect import find_outer
from advisor.schemes import Scheme
from advisor.search.outer_codes import check_ends
from advisor.search.scores import fits
from advisor.search.walk import Walk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import LoadedModel
    from advisor.modelspec.outer import OuterModule
    from advisor.numerics.quantized_weight import QuantizedWeight
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
            may name embedding and head too; of a GGUF file without, llama.cpp's rules decide their
            types, and the statistics, where there are any, their codes.
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
    walk = Walk(
        loaded, assignment, settings, store, samples=samples, calibration=calibration, pool=pool
    )
    walk.run(progress)
    if store is not None and store.has_gradients:
        ends = {**_block_types(outer.values(), ends, walk.weights), **ends}
    for name, scheme in ends.items():
        if scheme.is_quantized:
            walk.quantize_end(outer[name], scheme)
    walk.replaced.update(_gguf_outer(loaded, walk.weights))
    return Realised(walk.weights, walk.replaced)


def _block_types(
    outer: Iterable[OuterModule], ends: Mapping[str, Scheme], weights: Mapping[str, QuantizedWeight]
) -> dict[str, Scheme]:
    """Return what llama.cpp's rules make of embedding and head, where nothing else is asked for.

    A GGUF file names a type for them in any case, so that codes may as well be fitted to what is
    known of them, at no more bytes. Measured on the small trained model (tied, q6_k by the rules;
    32x256 calibration and 32x256 evaluation tokens), KL with the ends rounded and fitted: all
    linears q5_k 0.00082 and 0.00036, the mixture at 5.59 bits 0.00069 and 0.00025.
    """
    kinds = {
        module.name: outer_kind(module.name, module.linear.in_features, weights, tied=module.tied)
        for module in outer
        if module.name not in ends
    }
    return {name: Scheme("gguf", kind) for name, kind in kinds.items() if kind is not None}


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
