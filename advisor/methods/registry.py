"""The methods by name, imported when first used, and dispatch on a scheme's method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from advisor.errors import InputError, did_you_mean
from advisor.schemes import METHODS, Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.numerics.quantized_weight import QuantizedWeight

_MODULES: dict[str, str] = {
    "rtn": "advisor.methods.rtn",
    "gptq": "advisor.methods.gptq",
    "awq": "advisor.methods.awq",
    "smoothquant": "advisor.methods.smoothquant",
    "hqq": "advisor.methods.hqq",
    "bnb": "advisor.methods.nf4",
    "gguf": "advisor.methods.gguf",
    "llm.int8": "advisor.methods.llm_int8",
    "mxfp4": "advisor.methods.microscaled",
    "mxfp8": "advisor.methods.microscaled",
    "nvfp4": "advisor.methods.microscaled",
}
_FLOAT_MODULES: dict[str, str] = {"gptq": "advisor.methods.gptq_float"}
"""Methods whose FP8 form is a file of its own."""
_W4A8_MODULE = "advisor.methods.w4a8"
"""Integer weights for FP8 inputs, of any method that has them."""


class Method(Protocol):
    """A quantizer: a module with this function, and perhaps ``quantize_many``."""

    def quantize(
        self,
        weight: Tensor,
        statistics: LayerStatistics | None,
        scheme: Scheme,
        settings: QuantizationSettings,
    ) -> QuantizedWeight:
        """Return the codes of a weight [out, in]; inputs are never modified."""
        ...


class BatchedMethod(Method, Protocol):
    """A quantizer that shares work between schemes."""

    def quantize_many(
        self,
        weight: Tensor,
        statistics: LayerStatistics | None,
        schemes: Sequence[Scheme],
        settings: QuantizationSettings,
    ) -> list[QuantizedWeight]:
        """Return the codes of every scheme, the same as one by one."""
        ...


class OutputMethod(Method, Protocol):
    """A quantizer that heeds what its outputs do to the model."""

    def quantize_each(
        self,
        weights: Sequence[Tensor],
        statistics: Sequence[LayerStatistics],
        scheme: Scheme,
        settings: QuantizationSettings,
    ) -> list[QuantizedWeight]:
        """Return the codes of linears that share their inputs."""
        ...


def method_names() -> tuple[str, ...]:
    """Return the names of the methods that quantize here, without importing them."""
    return tuple(_MODULES)


def get_method(name: str) -> Method:
    """Import and return a method.

    Raises:
        InputError: Unknown (with the nearest known name), or known but done elsewhere.
    """
    if name in _MODULES:
        return cast("Method", importlib.import_module(_MODULES[name]))
    known = ", ".join(_MODULES)
    if name in METHODS:
        raise InputError(f"method {name!r} is not quantized by Advisor itself, which has: {known}.")
    raise InputError(f"unknown method {name!r}: use one of {known}.{did_you_mean(name, _MODULES)}")


def _implementation(scheme: Scheme) -> Method:
    """Return what quantizes to a scheme: its method, or that method's form for FP8."""
    if scheme.is_integer and scheme.activation == "fp8" and scheme.method in _MODULES:
        return cast("Method", importlib.import_module(_W4A8_MODULE))
    if scheme.weight == "fp8" and scheme.method in _FLOAT_MODULES:
        return cast("Method", importlib.import_module(_FLOAT_MODULES[scheme.method]))
    return get_method(scheme.method)


def _with_inputs(
    weight: QuantizedWeight, statistics: LayerStatistics | None, settings: QuantizationSettings
) -> QuantizedWeight:
    """Return a weight with the scale of its inputs, where they are rounded with a fixed one."""
    if not weight.scheme.static_activation:
        return weight
    # Advice asks this module for names alone, and needs no torch for them.
    scales = importlib.import_module("advisor.methods.input_scales")
    return cast("QuantizedWeight", scales.with_input_scale(weight, statistics, settings))


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight [out, in] by the scheme's method.

    For awq and smoothquant the weight is the folded one, and the statistics are those of the
    inputs after they were divided by the scales.

    Raises:
        InputError: The method, the weight or the statistics cannot be used.
    """
    found = _implementation(scheme).quantize(weight, statistics, scheme, settings)
    return _with_inputs(found, statistics, settings)


def quantize_many(
    weight: Tensor,
    statistics: LayerStatistics | None,
    schemes: Sequence[Scheme],
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize one weight by every scheme, sharing what can be shared.

    Args:
        weight: Shape [out, in]. Weights with the same inputs (q, k, v) may be stacked as rows:
            rows are independent of each other, but for schemes with one scale per tensor or block.
        statistics: Of the inputs; may be None for methods that need none.
        schemes: In any order, of any methods; equal ones are computed once.
        settings: Shared by all.

    Returns:
        One result per scheme, in their order, equal to what :func:`quantize` gives for each.

    Raises:
        InputError: A method, the weight or the statistics cannot be used.
    """
    by_method: dict[Method, list[Scheme]] = {}
    for scheme in dict.fromkeys(schemes):
        by_method.setdefault(_implementation(scheme), []).append(scheme)
    done: dict[Scheme, QuantizedWeight] = {}
    for method, members in by_method.items():
        if hasattr(method, "quantize_many"):
            batched = cast("BatchedMethod", method)
            results = batched.quantize_many(weight, statistics, members, settings)
        else:
            results = [method.quantize(weight, statistics, scheme, settings) for scheme in members]
        done.update(zip(members, results, strict=True))
    return [_with_inputs(done[scheme], statistics, settings) for scheme in schemes]


def quantize_each(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize linears that share their inputs, with what is known of each one's outputs.

    Args:
        weights: Shapes [out_i, in], any floating type; not modified.
        statistics: Of each linear: the same inputs, and its own output gradients.
        scheme: Of all of them; of a method that heeds outputs
            (:func:`advisor.search.families.couples_outputs`).
        settings: Shared by all.

    Raises:
        InputError: The method, a weight or the statistics cannot be used.
    """
    method = cast("OutputMethod", _implementation(scheme))
    found = method.quantize_each(weights, statistics, scheme, settings)
    return [
        _with_inputs(weight, own, settings) for weight, own in zip(found, statistics, strict=True)
    ]
