"""Whether weights of a checkpoint resemble those that they were made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.workflows.remeasuring import Check

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.plan.schema import Plan

_RELATIVE_ERROR_LIMIT = 0.75
"""A weight that differs more from its source, relative to the source's norm, is another weight.
Two-bit rounding stays below; an unrelated weight of the same size is at 1.4."""
_LISTED = 3


def check_weights(
    plan: Plan,
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    progress: Callable[[int, int], None],
) -> Check:
    """Compare every weight with its source: a swapped or damaged module does not resemble it.

    Args:
        plan: What the checkpoint was made from.
        checkpoint: Its files.
        loaded: The 16-bit model.
        progress: Called with (modules done, in all).
    """
    source_of = _sources(plan, loaded)
    # Some libraries write rounded weights back in 16 bits.
    rounded = plan.backend is not None and checkpoint.format == "safetensors"
    wrong = []
    worst = (0.0, "")
    for done, name in enumerate(checkpoint.modules):
        source = source_of(f"{name}.weight")
        if source is None:
            wrong.append(f"{name} is no module of the model")
            continue
        error = relative_error(source, checkpoint.weight(name).to(source.device).dequantize())
        worst = max(worst, (error, name))
        if not error < _RELATIVE_ERROR_LIMIT:
            wrong.append(f"{name} does not resemble its source (relative error {error:.2f})")
        progress(done + 1, len(checkpoint.modules))
    for name, tensor in checkpoint.other_tensors():
        source = source_of(name)
        if source is not None and tensor.shape != source.shape:
            wrong.append(f"{name} has shape {list(tensor.shape)}")
        elif source is not None and "norm" not in name:
            error = relative_error(source, tensor)
            # GGUF stores embedding and head in blocks too.
            loose = checkpoint.format == "gguf" or rounded
            if error > (_RELATIVE_ERROR_LIMIT if loose else 0.01):
                wrong.append(f"{name} differs from its source (relative error {error:.2f})")
    detail = f"largest relative error {worst[0]:.3f} ({worst[1]})" if worst[1] else "none quantized"
    return Check("weights", not wrong, listed(wrong) or detail)


def _sources(plan: Plan, loaded: LoadedModel) -> Callable[[str], Tensor | None]:
    """Return what looks up a tensor's source: the 16-bit one, rotated where the plan rotates."""
    from advisor.formats.layouts import HEADS
    from advisor.models.rotation import rotation_of
    from advisor.search.assignment import settings_of

    settings = settings_of(plan)
    names = {name for name, _ in loaded.model.named_parameters()}
    heads = {f"{head}.weight": "lm_head.weight" for head in HEADS if "lm_head.weight" in names}
    rotation = rotation_of(loaded.model, settings.rotation, settings.rotation_seed)
    turned = {} if rotation is None else rotation.outer()
    linears = {linear.name: linear for linear in loaded.linears}

    def find(name: str) -> Tensor | None:
        name = heads.get(name, name)
        if name in turned:
            return turned[name]
        linear = linears.get(name.rpartition(".")[0])
        if rotation is not None and linear is not None:
            if name.endswith(".weight"):
                return rotation.weight(linear)
            return rotation.block(loaded.linears, linear.block).get(name, loaded.tensor(name))
        return loaded.tensor(name) if name in names else None

    return find


def relative_error(source: Tensor, other: Tensor) -> float:
    """Return ‖other - source‖ / ‖source‖, after the best rescaling of each input column.

    Rescaling forgives what AWQ and SmoothQuant do on purpose: they scale columns.

    Args:
        source: [out, in] or [n].
        other: The same shape; on any device.
    """
    source, other = source.to(torch.float32), other.to(source.device).to(torch.float32)
    if source.dim() == 2:
        numerator = (source * other).sum(0)
        other = other * (numerator / other.square().sum(0).clamp_min(1e-30)).clamp_min(0.0)
    return float((other - source).norm() / source.norm().clamp_min(1e-30))


def listed(problems: list[str]) -> str:
    """Return the first few problems in one line, and how many more there are."""
    shown = "; ".join(problems[:_LISTED])
    rest = len(problems) - _LISTED
    return shown if rest <= 0 else f"{shown}; and {rest} more"
