"""HQQ checkpoints: the state of hqq's ``HQQLinear``, as transformers 4 saved it in safetensors.

A module has ``W_q`` (its codes in rows of one group, packed along the rows: the first half of them
in the high bits), ``scale`` and ``zero`` with one row per group, and its settings, each a tensor:
numbers as int32, truth values as one byte, texts as their characters.

Read by hqq itself (``HQQLinear.load_state_dict``) and by transformers before 5, which later
dropped its loader.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advisor.formats.base import HEAD, Found, Stored, check_tensor, complain, first_fault
from advisor.numerics.packing import pack_hqq, unpack_hqq
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAME = "hqq"
_FLAGS = {
    "channel_wise": True, "encoded_state_dict": True, "offload_meta": False, "optimize": True,
    "quant_scale": False, "quant_zero": False, "round_zero": False, "stores_quant_config": True,
    "view_as_float": False,
}  # fmt: skip
_PACKING = {2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}
_BYTES = {2: "U8", 3: "I32", 4: "U8", 5: "U8", 6: "U8", 8: "U8"}
_PER_ROW = {2: 4, 3: 10, 4: 2, 5: 1, 6: 1, 8: 1}
"""Rows of codes that share one row of ``W_q``."""
_INPUT_AXIS = 1
SUFFIXES = (
    "W_q", "scale", "zero", "nbits", "group_size", "shape", "axis", "packing", "compute_dtype",
    "unpack_view_dtype", *_FLAGS, "weight",
)  # fmt: skip


def problems(weights: Mapping[str, QuantizedWeight]) -> list[str]:
    """Return why these weights cannot be stored, one complaint per rule broken."""
    broken: dict[str, list[str]] = {}
    schemes: dict[str, int] = {}
    for name, weight in weights.items():
        scheme = weight.scheme
        schemes[str(scheme)] = schemes.get(str(scheme), 0) + 1
        if scheme.method != "hqq":
            broken.setdefault(f"format 'hqq' holds hqq weights, not {scheme}", []).append(name)
        elif scheme.bits in (2, 4) and weight.scales.numel() % _PER_ROW[int(scheme.bits)]:
            rows = _PER_ROW[int(scheme.bits)]
            rule = f"hqq packs {rows} groups of {scheme.weight} together, which must divide theirs"
            broken.setdefault(rule, []).append(name)
    complaints = complain(broken)
    if len(schemes) > 1 and not broken:
        seen = ", ".join(f"{key} ({count} modules)" for key, count in sorted(schemes.items()))
        complaints.append(
            f"format 'hqq' has one scheme for the whole checkpoint, but got {seen}. "
            "Keep the others 16-bit."
        )
    return complaints


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme itself: no other method has zero points of this kind."""
    return scheme


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``, with the keys of transformers' HqqConfig."""
    scheme = next(iter(weights.values())).scheme
    parameters = {
        "axis": _INPUT_AXIS,
        "channel_wise": True,
        "group_size": scheme.group_size,
        "nbits": int(scheme.bits),
        "optimize": True,
        "round_zero": False,
        "view_as_float": False,
    }
    return {
        "quant_config": {
            "offload_meta": False,
            "scale_quant_params": None,
            "weight_quant_params": parameters,
            "zero_quant_params": None,
        },
        "quant_method": "hqq",
        "skip_modules": sorted({*unquantized, HEAD}),
    }


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return none: every loader reads config.json and the tensors."""
    del config
    return {}


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of one module; scales and zero points take the model's data type."""
    del config
    bits, size = int(weight.scheme.bits), int(weight.scheme.group_size or 1)
    zeros = weight.zero_points
    if zeros is None:  # not hqq's; problems() has said so
        raise ValueError(f"{name} has no zero points.")
    stored = _narrowest(weight.scales, zeros, dtype)
    tensors = {
        "W_q": pack_hqq(weight.codes.reshape(-1, size), bits),
        "scale": weight.scales.reshape(-1, 1).to(stored),
        "zero": zeros.reshape(-1, 1).to(stored),
        "nbits": torch.tensor(bits, dtype=torch.int32),
        "group_size": torch.tensor(size, dtype=torch.int32),
        "axis": torch.tensor(_INPUT_AXIS, dtype=torch.int32),
        "shape": torch.tensor(weight.shape, dtype=torch.int64),
        "packing": _text(_PACKING[bits]),
        "unpack_view_dtype": _text("torch.int32" if bits == 3 else "torch.uint8"),
        "compute_dtype": _text(str(stored)),
    }
    tensors |= {key: torch.tensor(int(on), dtype=torch.uint8) for key, on in _FLAGS.items()}
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def _narrowest(scales: Tensor, zeros: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the first data type that holds scales and zero points exactly: both share one."""
    first: tuple[torch.dtype, ...] = (dtype,) if dtype.itemsize == 2 else ()
    for candidate in (*first, torch.bfloat16, torch.float16):
        if all(torch.equal(part.to(candidate).float(), part) for part in (scales, zeros)):
            return candidate
    return torch.float32


def _text(value: str) -> Tensor:
    return torch.tensor([ord(character) for character in value], dtype=torch.uint8)


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module by its own settings, and check its tensors."""
    kept = set(config.get("skip_modules") or ())
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    for name in stored.modules_with(("W_q",)):
        if name in kept:
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        scheme, wrong = _check_module(name, stored)
        faults.extend(wrong)
        if scheme is not None and not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def _check_module(name: str, stored: Stored) -> tuple[Scheme | None, list[str]]:
    """Return the scheme and the faults of one module."""
    missing = [
        check_tensor(stored, name, key, shape, kinds)
        for key, shape, kinds in (
            ("nbits", (), ("I32",)), ("group_size", (), ("I32",)), ("axis", (), ("I32",)),
            ("shape", (2,), ("I64",)), *((flag, (), ("U8",)) for flag in _FLAGS),
        )
    ]  # fmt: skip
    if wrong := first_fault(missing):
        return None, wrong
    bits, size = (int(stored.load(f"{name}.{key}")) for key in ("nbits", "group_size"))
    out_features, in_features = (int(value) for value in stored.load(f"{name}.shape"))
    if bits not in _PACKING or size < 1 or in_features % size:
        return None, [f"{name}: {bits} bits in groups of {size} of {in_features} are unknown."]
    if int(stored.load(f"{name}.axis")) != _INPUT_AXIS:
        return None, [f"{name}: groups along the outputs (axis 0) are unknown."]
    odd = [
        key
        for key, on in _FLAGS.items()
        if key not in ("optimize", "round_zero", "offload_meta")
        and bool(stored.load(f"{name}.{key}")) != on
    ]
    if odd:
        return None, [f"{name}: {', '.join(odd)} differ from what is read here."]
    scheme = Scheme("hqq", f"int{bits}", "group", size, symmetric=False)
    groups = out_features * in_features // size
    rows = -(-groups // _PER_ROW[bits])
    found = [
        check_tensor(stored, name, "W_q", (rows, size), (_BYTES[bits],)),
        check_tensor(stored, name, "scale", (groups, 1)),
        check_tensor(stored, name, "zero", (groups, 1)),
    ]
    return scheme, first_fault(found, f"its own settings say {scheme}")


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    out_features, in_features = (int(value) for value in stored.load(f"{name}.shape"))
    groups = out_features * in_features // int(scheme.group_size or 1)
    codes = unpack_hqq(stored.load(f"{name}.W_q"), int(scheme.bits), groups)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.reshape(out_features, in_features),
        scales=stored.load(f"{name}.scale").float().view(out_features, -1),
        zero_points=stored.load(f"{name}.zero").float().view(out_features, -1),
    )
