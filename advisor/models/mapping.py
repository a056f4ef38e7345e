"""Build a model around mapped weights, where a checkpoint's tensors are the model's as they are.

What transformers would convert while it loads (renamed keys, fused experts, other data types) is
left to transformers, whose own loading then holds the model in memory whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from advisor.errors import InputError
from advisor.models.architectures import get_architecture
from advisor.models.layout import as_stored
from advisor.models.mapped import MappedWeights

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_LISTED = 3


def map_model(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, MappedWeights] | str:
    """Build a model whose parameters are views of its weight files.

    Args:
        folder: A Hugging Face model folder that was checked.
        dtype: What the model will compute in.

    Returns:
        The model in training mode with the files it is a view of, or why it cannot be one.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    try:
        weights = MappedWeights(folder)
    except (ValueError, OSError, InputError) as error:
        return str(error)
    model = _empty_model(config, dtype)
    separated = get_architecture(type(model).__name__).experts is not None
    if separated:  # then the stored tensors of single experts have their own places
        as_stored(model)
    problem = _fits(model, weights.tensors, dtype)
    if not problem and not separated:
        problem = _converted(model, weights.tensors)
    if problem:
        return problem
    _assign(model, weights.tensors)
    left = [name for name, tensor in _all_tensors(model).items() if tensor.is_meta]
    if left:
        return f"{_list(left)} would have no value"
    if (folder / "generation_config.json").is_file():
        setting: Any = model
        setting.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model, weights


def _empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Return a model with buffers as they should be and parameters without values."""
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    model.tie_weights()  # parameters were replaced one by one, which parted tied ones
    empty: nn.Module = model
    return empty


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters, tied ones under every name, and buffers."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def _aliases(model: nn.Module) -> list[list[str]]:
    """Return the names of every stored tensor of a model; tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _fits(model: nn.Module, stored: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Return why stored tensors are not the model's, one to one; empty where they are."""
    expected = model.state_dict(keep_vars=True)
    unknown = sorted(stored.keys() - expected.keys())
    if unknown:
        return f"{_list(unknown)} have other names in the model, or none"
    for names in _aliases(model):
        present = [name for name in names if name in stored]
        if len(present) != 1:
            return f"{_list(names)} are stored {len(present)} times"
        tensor, wanted = stored[present[0]], expected[names[0]]
        if tensor.shape != wanted.shape:
            return f"{present[0]} has shape {list(tensor.shape)} instead of {list(wanted.shape)}"
        if tensor.dtype != dtype and not _widens(tensor.dtype, dtype):
            return f"{present[0]} is stored as {tensor.dtype}"
    return ""


def _widens(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every value of a type is one of the type that is computed in."""
    if stored in (torch.float16, torch.bfloat16):
        return dtype in (torch.float32, torch.float64)
    return stored == torch.float32 and dtype == torch.float64


def _converted(model: Any, stored: dict[str, Tensor]) -> str:
    """Return why transformers would not take the tensors as they are; empty where it would."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before 5.0 there was only renaming, which _fits notices
        return ""
    for transform in get_model_conversion_mapping(model):
        for name in stored:
            renamed, pattern = transform.rename_source_key(name)
            if pattern is not None and (renamed != name or hasattr(transform, "operations")):
                return f"transformers converts {name} while it loads"
    return ""


def _assign(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give every stored tensor its place, or its places where it is tied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for names in _aliases(model):
        value = next(stored[name] for name in names if name in stored)
        if names[0] in parameters:
            value = nn.Parameter(value, requires_grad=False)
        for name in names:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, value)


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
