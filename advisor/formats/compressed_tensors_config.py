"""``quantization_config`` of compressed-tensors: config groups, targets and what is ignored."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from advisor.formats.base import FUSED_ALIASES, HEAD
from advisor.formats.layouts import expert_paths, is_side_linear
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

PACKED = "pack-quantized"
INT = "int-quantized"
FLOAT = "float-quantized"
NVFP4 = "nvfp4-pack-quantized"
MXFP4 = "mxfp4-pack-quantized"
MXFP8 = "mxfp8-quantized"
MICROSCALED = {"mxfp4": MXFP4, "mxfp8": MXFP8, "nvfp4": NVFP4}
"""Format of each micro-scaled weight type."""
_GROUP_SIZES = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}
_SCALE_DTYPES = {"mxfp4": "torch.uint8", "mxfp8": "torch.uint8", "nvfp4": "torch.float8_e4m3fn"}
_MIXED = "mixed-precision"
_STATUS = ("compressed",)
_VERSION = "0.10.0"
"""Oldest release of the library whose reader knows all that is written here."""


def scheme_format(scheme: Scheme) -> str:
    """Return the compression format of a scheme's tensors."""
    if scheme.weight in MICROSCALED:
        return MICROSCALED[scheme.weight]
    if scheme.weight == "fp8":
        return FLOAT
    if scheme.activation is not None and scheme.bits == 8:
        return INT
    return PACKED


def build_config(schemes: Mapping[str, Scheme], unquantized: Sequence[str]) -> dict[str, Any]:
    """Return ``quantization_config``.

    Loaders look a module's own name up before its class. Where all linears but the head have one
    scheme, the target is the class ``Linear``, as everybody writes it; otherwise each module is
    named, since expressions that cover a fused module partly are what makes loaders fail, and so is
    what engines fuse: SGLang knows the parts of few models' fused modules (of Llama's, Qwen2's and
    Mixtral's not, release 0.5.23) and looks up ``qkv_proj`` itself. The experts of a layer are one
    module to loaders, and a single expression covers them; of experts in 16 bits they ask for the
    first one by names that not all files use.

    Args:
        schemes: Scheme of every quantized module.
        unquantized: Linears that stay 16-bit.
    """
    members: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        members.setdefault(str(scheme), []).append(name)
    kept = [name for name in unquantized if not is_side_linear(name)]
    groups: dict[str, Any] = {}
    for number, key in enumerate(sorted(members)):
        scheme = schemes[members[key][0]]
        uniform = len(members) == 1 and not kept
        groups[f"group_{number}"] = {
            "format": scheme_format(scheme),
            "input_activations": _input_arguments(scheme),
            "output_activations": None,
            "targets": _class_targets(schemes) if uniform else _targets(members[key], members),
            "weights": _weight_arguments(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else _MIXED,
        "global_compression_ratio": None,
        "ignore": sorted(
            {*unquantized, *fused_names(unquantized), *_first_experts(unquantized, schemes)}
            | ({HEAD} - schemes.keys())
        ),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }


def _class_targets(schemes: Mapping[str, Scheme]) -> list[str]:
    """Return the targets where all linears are alike; vLLM's head is no ``Linear``, so is named."""
    return ["Linear", *({HEAD} & schemes.keys())]


def _targets(names: Sequence[str], members: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the targets of one config group: names, and one expression for layers of experts."""
    others, paths = expert_paths(names)
    foreign = {
        path for group in members.values() if group is not names for path in expert_paths(group)[1]
    }
    others = [*others, *fused_names(others)]
    shared = [path for path in paths if path not in foreign]
    if not shared:
        return sorted({*names, *others})
    split = [name for name in names if name.partition(".experts.")[0] + ".experts" in foreign]
    escaped = "|".join(re.escape(path) for path in shared)
    return [*sorted(others + split), rf"re:(?:{escaped})\.\d+\."]


def fused_names(names: Iterable[str]) -> list[str]:
    """Return what engines call the products of modules whose parts are all among these."""
    parents: dict[str, set[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        parents.setdefault(parent, set()).add(leaf)
    return [
        f"{parent}.{alias}"
        for parent, leaves in parents.items()
        for alias, parts in FUSED_ALIASES
        if parts <= leaves
    ]


def _first_experts(unquantized: Sequence[str], schemes: Mapping[str, Scheme]) -> list[str]:
    """Return the names by which loaders ask whether the experts of a layer stay in 16 bits."""
    quantized = set(expert_paths(schemes)[1])
    return [
        f"{path}.0.{leaf}"
        for path in expert_paths(unquantized)[1]
        if path not in quantized
        for leaf in ("gate_proj", "up_proj", "down_proj")
    ]


def _weight_arguments(scheme: Scheme) -> dict[str, Any]:
    """Return how weights are stored."""
    if scheme.weight in MICROSCALED:
        return _microscaled_arguments(scheme.weight, inputs=False)
    block = scheme.granularity == "block"
    return {
        "actorder": None,
        "block_structure": [scheme.group_size, scheme.group_size] if block else None,
        "dynamic": False,
        "group_size": scheme.group_size if scheme.granularity == "group" else None,
        "num_bits": int(scheme.bits),
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": scheme.granularity,
        "symmetric": scheme.symmetric is not False,
        "type": "int" if scheme.is_integer else "float",
    }


def _input_arguments(scheme: Scheme) -> dict[str, Any] | None:
    """Return how inputs are quantized at run time: per token, or with a calibrated scale."""
    if scheme.activation is None:
        return None
    if scheme.activation in MICROSCALED:
        return _microscaled_arguments(scheme.activation, inputs=True)
    block, static = scheme.granularity == "block", scheme.static_activation
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": not static,
        "group_size": scheme.group_size if block else None,
        "num_bits": 8,
        "observer": "minmax" if static else None,
        "observer_kwargs": {},
        "strategy": "tensor" if static else "group" if block else "token",
        "symmetric": True,
        "type": "int" if scheme.activation == "int8" else "float",
    }


def _microscaled_arguments(kind: str, *, inputs: bool) -> dict[str, Any]:
    """Return how weights, or inputs at run time, are stored in a micro-scaled type."""
    nvfp4 = kind == "nvfp4"
    return {
        "actorder": None,
        "block_structure": None,
        # "local": groups get their scale at run time, the tensor's own is in the checkpoint.
        "dynamic": ("local" if nvfp4 else True) if inputs else False,
        "group_size": _GROUP_SIZES[kind],
        "num_bits": 8 if kind == "mxfp8" else 4,
        "observer": ("static_minmax" if nvfp4 else None) if inputs else "minmax",
        "observer_kwargs": {},
        "scale_dtype": _SCALE_DTYPES[kind],
        "strategy": "tensor_group" if nvfp4 else "group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": _SCALE_DTYPES[kind],
    }


def microscaled_type(arguments: Mapping[str, Any]) -> str | None:
    """Return the micro-scaled type that arguments of weights or inputs stand for, or None."""
    keys = ("type", "num_bits", "group_size", "strategy")
    found = tuple(arguments.get(key) for key in keys)
    if found == ("float", 4, 16, "tensor_group"):
        return "nvfp4"
    if found == ("float", 4, 32, "group"):
        return "mxfp4"
    if found == ("float", 8, 32, "group") and arguments.get("scale_dtype") == "torch.uint8":
        return "mxfp8"
    return None


def resolve_module(name: str, config: Mapping[str, Any]) -> tuple[Scheme, str] | None:
    """Return the scheme and format that loaders give a linear; None where it stays 16-bit.

    Raises:
        ValueError: The configuration gives the module something that is not known here.
    """
    group = _group_of(name, config)
    if group is None:
        return None
    return _scheme_of(group), str(group.get("format") or config.get("format"))


def asymmetric_inputs(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether a module's inputs are rounded around a zero point of their own."""
    inputs = (_group_of(name, config) or {}).get("input_activations") or {}
    return inputs.get("type") == "int" and not inputs.get("symmetric", True)


def _group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the config group that loaders take for a linear: its own name before its class."""
    if any(_matches(name, pattern) for pattern in config.get("ignore") or ()):
        return None
    groups: list[Mapping[str, Any]] = list((config.get("config_groups") or {}).values())
    for by_class in (False, True):
        for group in groups:
            for target in group.get("targets") or ():
                if target == "Linear" if by_class else _matches(name, target):
                    return group
    return None


def _matches(name: str, target: str) -> bool:
    """Return whether a target names this module, itself or by a regular expression."""
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _scheme_of(group: Mapping[str, Any]) -> Scheme:
    """Return the scheme that a config group stands for."""
    weights = group.get("weights") or {}
    inputs = group.get("input_activations")
    if (micro := microscaled_type(weights)) is not None:
        activation = microscaled_type(inputs) if inputs else None
        if inputs and activation != micro:
            raise ValueError(f"{micro} weights with inputs other than {micro} are unknown.")
        return Scheme(micro, micro, activation=activation)
    bits, kind = weights.get("num_bits"), weights.get("type", "int")
    strategy = weights.get("strategy")
    if (kind == "float" and bits != 8) or kind not in ("int", "float") or bits not in range(2, 9):
        raise ValueError(f"weights of type {kind!r} with {bits} bits are unknown.")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise ValueError(f"strategy {strategy!r} is unknown.")
    if weights.get("actorder") in ("group", "dynamic"):
        raise ValueError("act-order groups are no longer read by vLLM and compressed-tensors.")
    size = weights.get("group_size")
    if strategy == "block":
        structure = weights.get("block_structure") or [None]
        if len(set(structure)) != 1:
            raise ValueError(f"blocks of {structure} are unknown: they must be square.")
        size = structure[0]
    elif strategy == "channel":
        size = -1
    elif strategy == "tensor":
        size = None
    if strategy in ("group", "block") and not isinstance(size, int):
        raise ValueError(f"strategy {strategy!r} needs a group size, but has {size!r}.")
    activation, static = None, False
    if inputs:
        static = not inputs.get("dynamic")
        if inputs.get("num_bits") != 8:
            raise ValueError(f"inputs of {inputs.get('num_bits')} bits are unknown: 8 are known.")
        if not inputs.get("symmetric", True) and inputs.get("type") != "int":
            raise ValueError("asymmetric inputs are known as integers only.")
        if static and inputs.get("strategy") != "tensor":
            raise ValueError("calibrated activations are known with one scale only.")
        activation = "int8" if inputs.get("type") == "int" else "fp8"
    return Scheme(
        "rtn",
        f"int{bits}" if kind == "int" else "fp8",
        granularity=strategy,
        group_size=size,
        symmetric=bool(weights.get("symmetric", True)) if kind == "int" else None,
        activation=activation,
        static_activation=static,
    )
