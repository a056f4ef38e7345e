"""Faults that shapes do not show: values that are not finite, zero points off by one, gaps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from advisor.errors import AdvisorError
from advisor.formats.base import HEAD, count_some
from advisor.formats.registry import get_format

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from advisor.formats.read import Checkpoint
    from advisor.modelspec import LinearSpec, TensorSpec
    from advisor.numerics.quantized_weight import QuantizedWeight

_COARSE_BITS = 4
"""Finest grid of which a step is so wide that a shift by one is no accident."""
_SHIFT = (0.6, 1.4)
"""Mean of a module's weights, in steps, that is taken for a shift by one."""
_DEVIATIONS = 6.0
"""... and in standard deviations of the mean of weights without one."""


def value_faults(
    checkpoint: Checkpoint,
    linears: Sequence[LinearSpec],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Read every tensor of a checkpoint and return what is wrong with it, a sentence per module.

    Args:
        checkpoint: As opened with ``allow_faults``.
        linears: The model's quantizable linears: their shapes.
        progress: Called with tensors done and in all.
    """
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}
    faults: list[str] = []
    count = len(checkpoint.modules)
    for done, name in enumerate(checkpoint.modules, start=1):
        try:
            weight = checkpoint.weight(name)
            faults += [f"{name}: {fault}" for fault in _weight_faults(weight, shapes.get(name))]
        except AdvisorError as error:
            faults.append(str(error))
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{name}: its tensors contradict each other ({_first_line(error)}).")
        if progress is not None:
            progress(done, count)
    for name, tensor in checkpoint.other_tensors():
        if tensor.is_floating_point() and not _finite(tensor):
            faults.append(f"{name} holds values that are not finite (NaN or infinity).")
    return faults


def gaps(
    checkpoint: Checkpoint, linears: Sequence[LinearSpec], tensors: Sequence[TensorSpec]
) -> list[str]:
    """Return what a loader would miss, or would find in another form than config.json says.

    Args:
        checkpoint: As opened with ``allow_faults``.
        linears: The model's quantizable linears.
        tensors: Every tensor of the 16-bit model.
    """
    stored = checkpoint.stored.headers
    reader = get_format(checkpoint.format)
    faulty = {name for fault in checkpoint.problems for name in fault.split(":", 1)[0].split()[:1]}
    plain = [
        linear.name
        for linear in linears
        if linear.name not in checkpoint.modules and linear.name not in faulty
    ]
    without = [name for name in plain if f"{name}.weight" not in stored]
    unpacked = [
        name
        for name in plain
        if f"{name}.weight" in stored and reader.expects(name, checkpoint.config)
    ]
    owned = {f"{linear.name}.weight" for linear in linears}
    others = [
        tensor.name
        for tensor in tensors
        if tensor.name not in owned and tensor.name not in stored
        and not tensor.name.startswith(f"{HEAD}.")
    ]  # fmt: skip
    faults = []
    if without:
        faults.append(f"{count_some(without, 'has', 'have')} no weight here.")
    if unpacked:
        faults.append(
            f"config.json says that {count_some(unpacked, 'is', 'are')} quantized, but the weight "
            "is 16-bit."
        )
    if others and checkpoint.format != "gguf":
        faults.append(f"{len(others)} tensors of the model are missing (first: {others[0]}).")
    if checkpoint.format != "gguf":
        faults += _not_plain(checkpoint, tensors, faulty)
    return faults


def _not_plain(
    checkpoint: Checkpoint, tensors: Sequence[TensorSpec], faulty: set[str]
) -> list[str]:
    """Return which tensors that no quantization explains are of another shape, or no numbers."""
    faults = []
    for tensor in tensors:
        header = checkpoint.stored.headers.get(tensor.name)
        module = tensor.name.removesuffix(".weight")
        if header is None or module in checkpoint.modules or module in faulty:
            continue
        if header.shape != tensor.shape:
            faults.append(
                f"{module}: its {tensor.name.rpartition('.')[2]} is {list(header.shape)}, "
                f"config.json says {list(tensor.shape)}."
            )
        elif not header.dtype.startswith(("F", "BF")):
            faults.append(
                f"{module}: its {tensor.name.rpartition('.')[2]} is stored as {header.dtype}, but "
                "config.json speaks of no quantization that would give these codes scales."
            )
    return faults


def _weight_faults(weight: QuantizedWeight, shape: tuple[int, int] | None) -> list[str]:
    """Return what is wrong with one module's numbers."""
    if shape is not None and weight.shape != shape:
        return [
            f"its codes are for a weight of {list(weight.shape)}, config.json says {list(shape)}."
        ]
    faults = []
    if not _finite(weight.scales):
        broken = int((~torch.isfinite(weight.scales)).sum())
        faults.append(f"{broken} of {weight.scales.numel()} scales are not finite.")
    elif not bool(weight.scales.any()):
        faults.append("all of its scales are zero.")
    for name in ("input_scale", "input_global_scale"):
        given = weight.extras.get(name)
        if given is not None and not (_finite(given) and bool((given > 0).all())):
            faults.append(f"the scale of its inputs is {float(given.flatten()[0])}.")
    index, groups = weight.group_index, weight.scales.shape[-1]
    if index is not None and (int(index.min()) < 0 or int(index.max()) >= groups):
        faults.append(
            f"its g_idx names group {int(index.max())}, but there are scales of {groups} groups."
        )
    if faults:
        return faults
    values = weight.dequantize()
    if not _finite(values):
        return ["its weights are not finite once dequantized."]
    return _shift(weight, values)


def _shift(weight: QuantizedWeight, values: Tensor) -> list[str]:
    """Notice zero points that are off by one: then every weight is, by one step of its grid.

    Weights of a linear are spread around zero, much closer than a step of up to 4 bits.
    """
    if weight.zero_points is None or weight.scheme.bits > _COARSE_BITS:
        return []
    step = float(weight.scales.abs().mean())
    mean, deviation = float(values.mean()), float(values.std())
    steps = mean / step if step else 0.0
    noise = _DEVIATIONS * deviation / math.sqrt(values.numel())
    if not _SHIFT[0] <= abs(steps) <= _SHIFT[1] or abs(mean) <= noise:
        return []
    direction, versions = ("low", "v1 read as v2") if steps > 0 else ("high", "v2 read as v1")
    return [
        f"the mean of its weights is {steps:+.2f} steps of the grid: its zero points look one too "
        f"{direction} (in gptq, {versions}; see checkpoint_format)."
    ]


def _finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, in one pass."""
    return bool(torch.isfinite(tensor.to(torch.float32).sum())) or bool(
        torch.isfinite(tensor.to(torch.float32)).all()
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
