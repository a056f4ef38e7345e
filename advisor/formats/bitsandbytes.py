"""bitsandbytes checkpoints as transformers saves and loads them: NF4, FP4 and LLM.int8().

4-bit modules have ``weight`` uint8 [out * in / 2, 1] (two codes to a byte, the first one high),
``weight.absmax``, ``weight.quant_map`` and a JSON text in ``weight.quant_state...``; with double
quantization ``absmax`` is uint8 and ``weight.nested_absmax`` and ``weight.nested_quant_map`` turn
it back. 8-bit modules have ``weight`` int8, ``SCB`` (row maxima) and ``weight_format``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advisor.formats.base import HEAD, Found, Stored, check_tensor, complain, first_fault
from advisor.methods.nf4 import BLOCK_SIZE, BLOCK_SIZES, spread_scales
from advisor.numerics.packing import pack_nibbles, unpack_nibbles
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.formats.base import Planned

NAME = "bitsandbytes"
_STATE = "weight.quant_state.bitsandbytes__"
_ABSMAX, _MAP = "weight.absmax", "weight.quant_map"
_NESTED, _NESTED_MAP = "weight.nested_absmax", "weight.nested_quant_map"
_STATES = (f"{_STATE}nf4", f"{_STATE}fp4")
SUFFIXES = (_ABSMAX, _MAP, _NESTED, _NESTED_MAP, *_STATES, "SCB", "weight_format", "weight")
_ROW_FORMAT = 0
"""``weight_format`` of row-major int8, the only one that recent releases write."""


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored, one complaint per rule broken."""
    broken: dict[str, list[str]] = {}
    schemes: dict[str, list[str]] = {}
    for name, weight in weights.items():
        schemes.setdefault(str(weight.scheme), []).append(name)
        if weight.scheme.method not in ("bnb", "llm.int8"):
            rule = f"format 'bitsandbytes' holds nf4, fp4 and llm.int8, not {weight.scheme}"
            broken.setdefault(rule, []).append(name)
    complaints = complain(broken)
    if len(schemes) > 1 and not broken:
        seen = ", ".join(f"{key} ({len(names)} modules)" for key, names in sorted(schemes.items()))
        complaints.append(
            f"format 'bitsandbytes' has one scheme for the whole checkpoint, but got {seen}. "
            "Keep the others 16-bit, or use compressed-tensors for mixtures."
        )
    return complaints


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme itself: data type and blocks say all."""
    if scheme.granularity == "group" and scheme.group_size == BLOCK_SIZE:
        return replace(scheme, granularity="none", group_size=None)
    return scheme


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``, with the same keys that transformers writes."""
    scheme = next(iter(weights.values())).scheme
    eight = scheme.method == "llm.int8"
    return {
        "_load_in_4bit": not eight,
        "_load_in_8bit": eight,
        "bnb_4bit_compute_dtype": "float32" if eight else "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4" if eight else scheme.weight,
        "bnb_4bit_use_double_quant": scheme.double_quantization,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # Not even an empty list: without one, loaders keep the head as it is.
        "llm_int8_skip_modules": sorted({*unquantized, *({HEAD} - weights.keys())}),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": not eight,
        "load_in_8bit": eight,
        "quant_method": "bitsandbytes",
    }


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return none: every loader reads config.json."""
    del config
    return {}


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of one module."""
    del config
    extras = weight.extras
    if weight.scheme.method == "llm.int8":
        return {
            f"{name}.weight": (weight.codes.to(torch.int16) - 128).to(torch.int8).contiguous(),
            f"{name}.SCB": extras["SCB"].to(torch.float32).contiguous(),
            f"{name}.weight_format": torch.tensor(_ROW_FORMAT, dtype=torch.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": weight.scheme.weight,
        "blocksize": int(extras["blocksize"]),
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    tensors = {
        f"{name}.weight": pack_nibbles(weight.codes),
        f"{name}.{_ABSMAX}": extras["absmax"].contiguous(),
        f"{name}.{_MAP}": extras["quant_map"].to(torch.float32).contiguous(),
    }
    if weight.scheme.double_quantization:
        state["nested_blocksize"] = int(extras["nested_blocksize"])
        state["nested_dtype"] = "float32"
        state["nested_offset"] = float(extras["offset"])
        tensors[f"{name}.{_NESTED}"] = extras["nested_absmax"].contiguous()
        tensors[f"{name}.{_NESTED_MAP}"] = extras["nested_quant_map"].to(torch.float32).contiguous()
    text = json.dumps(state).encode("utf-8")
    tensors[f"{name}.{_STATE}{weight.scheme.weight}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized."""
    kept = config.get("llm_int8_skip_modules")
    kept = (HEAD,) if kept is None else kept
    return not any(name == part or name.endswith(f".{part}") for part in kept)


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module with bitsandbytes tensors, and check their shapes."""
    eight = bool(config.get("load_in_8bit", config.get("_load_in_8bit")))
    four = bool(config.get("load_in_4bit", config.get("_load_in_4bit")))
    if eight == four:
        return Found({}, ("config.json says neither 4-bit nor 8-bit bitsandbytes, or both.",))
    names = set(stored.modules_with(SUFFIXES[:-1]))
    names.update(
        name
        for name in stored.modules_with(("weight",))
        if stored.headers[f"{name}.weight"].dtype in ("I8", "U8")
    )
    kept = set(config.get("llm_int8_skip_modules") or ())
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    for name in sorted(names):
        if name in kept:
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        scheme, wrong = _eight(name, stored) if eight else _four(name, config, stored)
        faults.extend(wrong)
        if scheme is not None and not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def _eight(name: str, stored: Stored) -> tuple[Scheme, list[str]]:
    """Return the scheme and the faults of one LLM.int8() module."""
    scheme = Scheme("llm.int8", "int8")
    header = stored.headers.get(f"{name}.weight")
    if header is None or len(header.shape) != 2:
        return scheme, [f"{name} has no weight: the tensor '{name}.weight' is missing."]
    wrong = [
        check_tensor(stored, name, "weight", header.shape, ("I8",)),
        check_tensor(stored, name, "SCB", (header.shape[0],), ("F32", "F16")),
    ]
    return scheme, first_fault(wrong)


def _four(name: str, config: Mapping[str, Any], stored: Stored) -> tuple[Scheme | None, list[str]]:
    """Return the scheme and the faults of one NF4 or FP4 module."""
    found = [key for key in _STATES if f"{name}.{key}" in stored.headers]
    if len(found) != 1:
        return None, [f"{name} has {len(found) or 'no'} quant_state, expected one."]
    kind = found[0].removeprefix(_STATE)
    nested = f"{name}.{_NESTED}" in stored.headers
    scheme = Scheme("bnb", kind, double_quantization=nested)
    if kind != config.get("bnb_4bit_quant_type"):
        said = config.get("bnb_4bit_quant_type")
        return scheme, [f"{name}: stored as {kind}, but config.json says {said}."]
    try:
        state = _state(name, kind, stored)
        out_features, in_features = (int(size) for size in state["shape"])
        blocksize = int(state["blocksize"])
    except (ValueError, KeyError, TypeError) as error:
        return scheme, [f"{name}: its quant_state cannot be read ({error})."]
    if blocksize not in BLOCK_SIZES:
        return scheme, [f"{name}: blocks of {blocksize} are unknown to bitsandbytes."]
    if blocksize != BLOCK_SIZE:
        scheme = replace(scheme, granularity="group", group_size=blocksize)
    count = out_features * in_features
    blocks = -(-count // blocksize)
    wrong = [
        check_tensor(stored, name, "weight", (-(-count // 2), 1), ("U8",)),
        check_tensor(stored, name, _ABSMAX, (blocks,), ("U8",) if nested else ("F32",)),
        check_tensor(stored, name, _MAP, (16,), ("F32",)),
    ]
    if nested:
        outer = -(-blocks // int(state["nested_blocksize"]))
        wrong.append(check_tensor(stored, name, _NESTED, (outer,), ("F32",)))
        wrong.append(check_tensor(stored, name, _NESTED_MAP, (256,), ("F32",)))
    return scheme, first_fault(wrong)


def _state(name: str, kind: str, stored: Stored) -> dict[str, Any]:
    """Return the JSON part of a 4-bit module's state."""
    text = bytes(stored.load(f"{name}.{_STATE}{kind}").tolist()).decode("utf-8")
    state: dict[str, Any] = json.loads(text)
    return state


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    if scheme.method == "llm.int8":
        maxima = stored.load(f"{name}.SCB").to(torch.float32)
        return QuantizedWeight(
            scheme=scheme,
            codes=(stored.load(f"{name}.weight").to(torch.int16) + 128).to(torch.uint8),
            scales=(maxima / 127.0).unsqueeze(1),
            extras={"SCB": maxima},
        )
    state = _state(name, scheme.weight, stored)
    out_features, in_features = state["shape"]
    extras = {
        "absmax": stored.load(f"{name}.{_ABSMAX}"),
        "quant_map": stored.load(f"{name}.{_MAP}"),
        "blocksize": torch.tensor(state["blocksize"]),
    }
    absmax = extras["absmax"]
    if scheme.double_quantization:
        extras["nested_absmax"] = stored.load(f"{name}.{_NESTED}")
        extras["nested_quant_map"] = stored.load(f"{name}.{_NESTED_MAP}")
        extras["nested_blocksize"] = torch.tensor(state["nested_blocksize"])
        extras["offset"] = torch.tensor(state["nested_offset"], dtype=torch.float32)
        outer = extras["nested_absmax"].repeat_interleave(state["nested_blocksize"])
        absmax = extras["nested_quant_map"][absmax.long()] * outer[: len(absmax)]
        absmax = absmax + extras["offset"]
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_nibbles(stored.load(f"{name}.weight"), (out_features, in_features)),
        scales=spread_scales(absmax, state["blocksize"], out_features, in_features),
        codebook=extras["quant_map"],
        extras=extras,
    )
