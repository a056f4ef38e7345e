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


def simulate_fp8(inputs: Tensor) -> Tensor:
    """Return inputs rounded to float8 e4m3, one scale per token: its largest magnitude over 448."""
    values = inputs.to(torch.float32)
    largest = values.abs().amax(dim=-1, keepdim=True)
    scales = torch.where(largest > 0, largest / _FP8_LIMIT, torch.ones_like(largest))
    codes = (values / scales).clamp_(-_FP8_LIMIT, _FP8_LIMIT).to(torch.float8_e4m3fn)
    return (codes.to(torch.float32) * scales).to(inputs.dtype)


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
        extras: Its weight's; NVFP4's ``input_global_scale`` is among them.

    Raises:
        InputError: The scheme's activations cannot be simulated.
    """
    if scheme.method == "llm.int8":
        return simulate_llm_int8
    if scheme.activation is None:
        return None
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

    Args:
        model: The unquantized model, as loaded; it is the one yielded.
        weights: By module path: the linear's quantized weight, or the weight to use as it is.
            Activations are quantized as the weight's scheme says.
        replaced: By tensor name: tensors that a transform changed beside them (norms, biases).

    Yields:
        The model. On exit, also after an exception, it has its own weights again, to the bit.

    Raises:
        InputError: A name is unknown or a shape differs; nothing was changed then.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    updates = {f"{name}.weight": weight for name, weight in weights.items()}
    doubled = updates.keys() & (replaced or {}).keys()
    if doubled:
        raise InputError(f"tensors are both quantized and replaced: {', '.join(sorted(doubled))}.")
    values: dict[str, QuantizedWeight | Tensor] = {**updates, **(replaced or {})}
    _check(parameters, values)
    simulations = {
        name: simulation
        for name, weight in weights.items()
        if isinstance(weight, QuantizedWeight)
        and (simulation := activation_simulation(weight.scheme, weight.extras)) is not None
    }
    saved: list[tuple[Tensor, Tensor]] = []
    handles = []
    try:
        for name, value in values.items():
            parameter = parameters[name]
            dense = value.dequantize() if isinstance(value, QuantizedWeight) else value
            saved.append((parameter, parameter.data))
            parameter.data = dense.detach().to(parameter.device, parameter.dtype)
        for name, simulation in simulations.items():
            hook = _input_hook(simulation)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        yield model
    finally:
        for handle in handles:
            handle.remove()
        # Backwards: a tied tensor that was given under two names gets its first value back.
        for parameter, data in reversed(saved):
            parameter.data = data


def _input_hook(simulation: Any) -> Any:
    def quantize_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (simulation(arguments[0]), *arguments[1:])

    return quantize_input


def _check(
    parameters: Mapping[str, Tensor], values: Mapping[str, QuantizedWeight | Tensor]
) -> None:
    """Refuse unknown names and wrong shapes, all at once."""
    problems = []
    for name, value in values.items():
        if name not in parameters:
            problems.append(f"the model has no tensor {name!r}.{did_you_mean(name, parameters)}")
        elif tuple(value.shape) != tuple(parameters[name].shape):
            expected = tuple(parameters[name].shape)
            problems.append(f"{name} has shape {expected}, but got {tuple(value.shape)}.")
    if problems:
        raise InputError(join_errors(problems))
