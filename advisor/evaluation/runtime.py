"""Run a model as an engine would run its checkpoint: stored weights, quantized activations."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.evaluation.microscaled_inputs import (
    simulate_fp8_groups,
    simulate_mxfp4,
    simulate_mxfp8,
    simulate_nvfp4,
)
from advisor.models.casting import casting_of
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from advisor.schemes import Scheme

OUTLIER_THRESHOLD = 6.0
"""LLM.int8()'s default: columns with an input of at least this magnitude stay in 16 bits."""
_INT8_LIMIT = 127.0
_FP8_LIMIT = 448.0


def simulate_int8(inputs: Tensor) -> Tensor:
    """Return inputs rounded to int8, one symmetric scale per token.

    The scale is the token's largest magnitude over 127 (what vLLM's dynamic kernel computes);
    ties round to even. A token of zeros stays zeros.

    Args:
        inputs: Shape [..., in], any float type.
    """
    values = inputs.to(torch.float32)
    largest = values.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / _INT8_LIMIT, torch.ones_like(largest))
    codes = torch.round(values / scales).clamp_(-128, 127)
    return (codes * scales).to(inputs.dtype)


def simulate_asymmetric_int8(inputs: Tensor) -> Tensor:
    """Return inputs rounded to int8 with a zero point per token; the grid spans it and zero.

    Args:
        inputs: Shape [..., in], any float type.
    """
    values = inputs.to(torch.float32)
    low = values.amin(dim=-1, keepdim=True).clamp_(max=0)
    span = values.amax(dim=-1, keepdim=True).clamp_(min=0) - low
    scales = torch.where(span > 0, span / 255.0, torch.ones_like(span))
    zeros = torch.round(-128 - low / scales)
    codes = (torch.round(values / scales) + zeros).clamp_(-128, 127)
    return ((codes - zeros) * scales).to(inputs.dtype)


def simulate_fp8(inputs: Tensor) -> Tensor:
    """Return inputs rounded to float8 e4m3, one scale per token: its largest magnitude over 448."""
    values = inputs.to(torch.float32)
    largest = values.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / _FP8_LIMIT, torch.ones_like(largest))
    codes = (values / scales).clamp_(-_FP8_LIMIT, _FP8_LIMIT).to(torch.float8_e4m3fn)
    return (codes.to(torch.float32) * scales).to(inputs.dtype)


def simulate_static_int8(inputs: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Return inputs rounded to int8 with one scale, given; larger ones saturate.

    Args:
        inputs: Shape [..., in], any float type.
        scale: The checkpoint's ``input_scale``, float32 [1].
        zero_point: Its ``input_zero_point``, int8 [1]; None where inputs are symmetric.
    """
    scale = scale.to(inputs.device)
    zero = 0.0 if zero_point is None else zero_point.to(inputs.device, torch.float32)
    codes = (torch.round(inputs.to(torch.float32) / scale) + zero).clamp_(-128, 127)
    return ((codes - zero) * scale).to(inputs.dtype)


def simulate_static_fp8(inputs: Tensor, scale: Tensor) -> Tensor:
    """Return inputs rounded to float8 e4m3 with one scale, given; larger ones saturate.

    As in vLLM's kernel, inputs are multiplied by the scale's reciprocal.

    Args:
        inputs: Shape [..., in], any float type.
        scale: The checkpoint's ``input_scale``, float32 [1].
    """
    scale = scale.to(inputs.device)
    values = (inputs.to(torch.float32) * scale.reciprocal()).clamp_(-_FP8_LIMIT, _FP8_LIMIT)
    return (values.to(torch.float8_e4m3fn).to(torch.float32) * scale).to(inputs.dtype)


def simulate_llm_int8(inputs: Tensor, threshold: float = OUTLIER_THRESHOLD) -> Tensor:
    """Return inputs as LLM.int8() multiplies them.

    A column that holds an outlier in any token of the batch keeps its precision; the others are
    rounded to int8 with one scale per token. As in bitsandbytes, that scale comes from every
    value below the threshold, also those in outlier columns. The weight is the dequantized int8
    one in both parts, so the product with these inputs is the whole computation.

    Args:
        inputs: Shape [..., in], any float type.
        threshold: Smallest magnitude of an outlier.

    Reference:
        Dettmers et al., LLM.int8(): 8-bit matrix multiplication for transformers at scale (2022),
        section 3.2.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    values = rows.to(torch.float16).to(torch.float32)
    outliers = values.abs() >= threshold
    largest = values.masked_fill(outliers, 0.0).abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest > 0, largest, torch.ones_like(largest))
    codes = torch.round(values * (_INT8_LIMIT / scales)).clamp_(-128, 127)
    rounded = (codes * scales / _INT8_LIMIT).to(inputs.dtype)
    return torch.where(outliers.any(dim=0), rows, rounded).view_as(inputs)


_STATIC = {"int8": simulate_static_int8, "fp8": simulate_static_fp8}
_SIMULATIONS = {
    "int8": simulate_int8,
    "fp8": simulate_fp8,
    "mxfp4": simulate_mxfp4,
    "mxfp8": simulate_mxfp8,
}


def activation_simulation(scheme: Scheme, extras: Mapping[str, Tensor] | None = None) -> Any:
    """Return the function that a scheme applies to inputs at run time, or None.

    Args:
        scheme: The module's scheme.
        extras: Its weight's; a calibrated ``input_scale``, NVFP4's ``input_global_scale`` and an
            ``input_zero_point`` (empty where each token gets its own) are among them.

    Raises:
        InputError: The scheme's activations cannot be simulated.
    """
    if scheme.method == "llm.int8":
        return simulate_llm_int8
    if scheme.activation is None:
        return None
    if scheme.static_activation:
        if "input_scale" not in (extras or {}):
            raise InputError(f"{scheme} needs an input_scale. Quantize with statistics.")
        static, fixed = _STATIC[scheme.activation], (extras or {})["input_scale"]
        if (zero := (extras or {}).get("input_zero_point")) is not None:
            return lambda inputs: simulate_static_int8(inputs, fixed, zero)
        return lambda inputs: static(inputs, fixed)
    if "input_zero_point" in (extras or {}):
        return simulate_asymmetric_int8
    if scheme.activation == "nvfp4":
        if "input_global_scale" not in (extras or {}):
            raise InputError(f"{scheme} needs an input_global_scale. Quantize with statistics.")
        scale = (extras or {})["input_global_scale"]
        return lambda inputs: simulate_nvfp4(inputs, scale)
    if scheme.activation == "fp8" and scheme.granularity == "block":
        width = int(scheme.group_size or 1)
        return lambda inputs: simulate_fp8_groups(inputs, width)
    return _SIMULATIONS[scheme.activation]


@contextmanager
def quantized_model(
    model: nn.Module,
    weights: Mapping[str, QuantizedWeight | Tensor],
    replaced: Mapping[str, Tensor] | None = None,
) -> Iterator[nn.Module]:
    """Let a model compute with quantized weights for a while.

    A weight is looked up and dequantized when its block is about to run, and dropped after, so a
    mapping that reads its values from disk keeps memory flat. Outside of a running block the
    parameters are the stored ones.

    Args:
        model: The unquantized model, as loaded; it is the one yielded.
        weights: By module path: the linear's quantized weight, or the weight to use as it is.
            Activations are quantized as the weight's scheme says.
        replaced: By tensor name: tensors that a transform changed beside them (norms, biases).

    Yields:
        The model. On exit, also after an exception, it computes with its own weights again.

    Raises:
        InputError: A name is unknown or a shape differs; nothing was changed then.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    others = replaced or {}
    doubled = {f"{name}.weight" for name in weights} & others.keys()
    if doubled:
        raise InputError(f"tensors are both quantized and replaced: {', '.join(sorted(doubled))}.")
    problems: list[str] = []
    simulations: dict[str, Any] = {}
    for name, weight in weights.items():
        problems += _problems(parameters, f"{name}.weight", tuple(weight.shape))
        if isinstance(weight, QuantizedWeight):
            simulation = activation_simulation(weight.scheme, weight.extras)
            if simulation is not None:
                simulations[name] = simulation
    for name, tensor in others.items():
        problems += _problems(parameters, name, tuple(tensor.shape))
    if problems:
        raise InputError(join_errors(problems))
    device = casting_of(model).device
    values = {parameters[f"{name}.weight"]: _Dense(weights, name, device) for name in weights}
    values |= {parameters[name]: _Dense(others, name, device) for name in others}
    handles = []
    try:
        for name, simulation in simulations.items():
            hook = _input_hook(simulation)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        with casting_of(model).replace(values):
            yield model
    finally:
        for handle in handles:
            handle.remove()


class _Dense:
    """Makes one weight on a device when it is called, of codes that lie anywhere."""

    def __init__(self, values: Mapping[str, Any], name: str, device: torch.device) -> None:
        self._values = values
        self._name = name
        self._device = device

    def __call__(self) -> Tensor:
        value: QuantizedWeight | Tensor = self._values[self._name]
        value = value.to(self._device)
        return value.dequantize() if isinstance(value, QuantizedWeight) else value


def _input_hook(simulation: Any) -> Any:
    def quantize_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (simulation(arguments[0]), *arguments[1:])

    return quantize_input


def _problems(parameters: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> list[str]:
    """Return what is wrong with a tensor's name or shape."""
    if name not in parameters:
        return [f"the model has no tensor {name!r}.{did_you_mean(name, parameters)}"]
    expected = tuple(parameters[name].shape)
    return [] if shape == expected else [f"{name} has shape {expected}, but got {shape}."]
