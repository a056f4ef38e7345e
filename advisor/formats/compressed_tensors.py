"""compressed-tensors checkpoints, which vLLM, SGLang and transformers read.

``pack-quantized``: integers of 2 to 8 bits as a dense stream of bits in int32 words, 16-bit (or
8-bit) activations. ``int-quantized``: int8 as it is, int8 activations. ``float-quantized``: FP8
(E4M3) as it is. ``naive-quantized``, which is only read: either, as it is. NVFP4, MXFP4 and MXFP8
have formats of their own. A checkpoint may hold several ``config_groups``, each with its own
format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advisor.formats import compressed_tensors_microscaled as microscaled
from advisor.formats.base import (
    Found,
    Stored,
    complain,
    exact_scales,
    is_consecutive,
)
from advisor.formats.compressed_tensors_checks import check_module
from advisor.formats.compressed_tensors_config import (
    INT,
    MICROSCALED,
    PACKED,
    asymmetric_inputs,
    build_config,
    fused_names,
    resolve_module,
    scheme_format,
)
from advisor.numerics.packing import (
    pack_compressed_tensors,
    pack_compressed_tensors_zeros,
    unpack_compressed_tensors,
    unpack_compressed_tensors_zeros,
)
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.formats.base import Planned

NAME = "compressed-tensors"
SUFFIXES = (
    "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale",
    "input_global_scale", "input_scale", "input_zero_point", "weight",
)  # fmt: skip


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored, one complaint per rule broken."""
    broken: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if rule := _broken_rule(weight):
            broken.setdefault(rule, []).append(name)
    return complain(broken)


def _broken_rule(weight: QuantizedWeight | Planned) -> str | None:
    """Return the rule that a weight breaks, or None."""
    scheme = weight.scheme
    if scheme.weight in MICROSCALED:
        if scheme.activation not in (None, scheme.weight):
            return f"format {NAME!r} pairs {scheme.weight} with inputs of its type, not {scheme}"
        return None
    if scheme.weight == "fp8":
        if scheme.granularity not in ("channel", "tensor", "block"):
            return f"format {NAME!r} holds FP8 scales per channel, tensor or block, not {scheme}"
        if scheme.activation not in (None, "fp8"):
            return f"format {NAME!r} pairs FP8 weights with FP8 activations, not {scheme}"
        # Inputs are rounded in groups as wide as a block.
        size = int(scheme.group_size or 1) if scheme.granularity == "block" else 1
        if scheme.activation is not None and weight.shape[1] % size:
            return f"the block size of {scheme} must divide in_features={weight.shape[1]}"
        return None
    if not scheme.is_integer or scheme.method == "llm.int8":
        return f"format {NAME!r} holds integer and FP8 weights, not {scheme}; use bitsandbytes"
    if scheme.method == "hqq":
        return f"format {NAME!r} has integer zero points, not those of {scheme}; use hqq"
    if scheme.granularity not in ("group", "channel"):
        return f"format {NAME!r} holds integer scales per group or channel, not {scheme}"
    if not is_consecutive(weight):
        return (
            f"format {NAME!r} has no act-order groups any more, as {scheme} has; "
            "use static groups, or format gptq"
        )
    if scheme.activation == "fp8" and not (
        scheme.weight == "int4" and scheme.symmetric and scheme.granularity == "group"
    ):
        return f"FP8 activations need symmetric int4 weights in groups, or FP8 ones, not {scheme}"
    if scheme.activation not in (None, "int8", "fp8"):
        return f"format {NAME!r} pairs integer weights with 8-bit activations, not {scheme}"
    if scheme.activation is not None and (not scheme.symmetric or scheme.bits not in (4, 8)):
        return f"int8 activations need symmetric int4 or int8 weights, not {scheme}"
    if scheme.activation is not None and scheme.bits == 8 and scheme.granularity != "channel":
        return f"W8A8 kernels need one scale per channel, not {scheme}"
    return None


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return what can be read back: everything but how the codes were chosen."""
    if scheme.weight in MICROSCALED:
        return scheme
    return Scheme(
        "rtn",
        scheme.weight,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        activation=scheme.activation,
        static_activation=scheme.static_activation,
    )


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``: one config group per scheme."""
    schemes = {name: storage_scheme(weight.scheme) for name, weight in weights.items()}
    return build_config(schemes, unquantized)


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return none: every loader reads config.json."""
    del config
    return {}


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors of one module in the format of its config group."""
    del config
    if weight.scheme.weight in MICROSCALED:
        return microscaled.pack(name, weight)
    scales = exact_scales(weight.scales, dtype, name)
    kind = scheme_format(weight.scheme)
    static: dict[str, Tensor] = {}
    if weight.scheme.static_activation:
        # Linears that share an input share the tensor too, which a file may hold only once.
        static[f"{name}.input_scale"] = weight.extras["input_scale"].to(torch.float32, copy=True)
    if kind == PACKED:
        bits = int(weight.scheme.bits)
        tensors = {
            f"{name}.weight_packed": pack_compressed_tensors(weight.codes, bits),
            f"{name}.weight_scale": scales,
            f"{name}.weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero_points is not None:
            zeros = pack_compressed_tensors_zeros(weight.zero_points, bits)
            tensors[f"{name}.weight_zero_point"] = zeros
        return tensors
    if kind == INT:
        values = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        return {f"{name}.weight": values.contiguous(), f"{name}.weight_scale": scales, **static}
    if weight.scheme.granularity == "tensor":
        scales = scales.reshape(1).clone()  # fused linears share it, a file holds it once each
    values = weight.codes.contiguous().view(torch.float8_e4m3fn)
    return {f"{name}.weight": values, f"{name}.weight_scale": scales, **static}


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized: a config group has it."""
    try:
        return resolve_module(name, config) is not None
    except ValueError:
        return True


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module by its config group, and check its tensors."""
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    quantized = set(stored.modules_with(SUFFIXES[:-1]))
    codes = ("I8", "U8", "F8_E4M3", "I32")
    quantized.update(
        name
        for name in stored.modules_with(("weight",))
        if stored.headers[f"{name}.weight"].dtype in codes
    )
    targets: set[str] = set()
    for group in (config.get("config_groups") or {}).values():
        targets.update(target for target in group.get("targets") or () if "." in target)
    named = {target for target in targets if not target.startswith("re:")}
    named -= set(fused_names(named)) - quantized
    for name in sorted(quantized | named):
        try:
            resolved = resolve_module(name, config)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            continue
        if resolved is None:
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        scheme, kind = resolved
        wrong = check_module(name, scheme, kind, stored, asymmetric_inputs(name, config))
        faults.extend(wrong)
        if not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    if scheme.weight in MICROSCALED:
        return microscaled.unpack(name, scheme, stored)
    scales = stored.load(f"{name}.weight_scale").to(torch.float32)
    resolved = resolve_module(name, config)
    kind = scheme_format(scheme) if resolved is None else resolved[1]
    zero_points = None
    if kind == PACKED:
        bits = int(scheme.bits)
        out_features, in_features = stored.load(f"{name}.weight_shape").tolist()
        words = stored.load(f"{name}.weight_packed")
        codes = unpack_compressed_tensors(words, bits, in_features)
        if not scheme.symmetric:
            zeros = stored.load(f"{name}.weight_zero_point")
            zero_points = unpack_compressed_tensors_zeros(zeros, bits, out_features)
    elif scheme.is_integer:
        # int-quantized and naive-quantized: signed integers as they are, of fewer bits too.
        codes = _from_signed(stored.load(f"{name}.weight"), scheme)
        if not scheme.symmetric:
            zero_points = _from_signed(stored.load(f"{name}.weight_zero_point"), scheme)
    else:
        codes = stored.load(f"{name}.weight").view(torch.uint8)
    if scheme.granularity == "tensor":
        scales = scales.reshape(1, 1)
    extras: dict[str, Tensor] = {}
    if scheme.static_activation:
        extras["input_scale"] = stored.load(f"{name}.input_scale").to(torch.float32).reshape(1)
    if scheme.activation is not None and asymmetric_inputs(name, config):
        extras["input_zero_point"] = (
            stored.load(f"{name}.input_zero_point").reshape(1)
            if scheme.static_activation
            else torch.empty(0, dtype=torch.int8)
        )
    return QuantizedWeight(scheme, codes, scales, zero_points=zero_points, extras=extras)


def _from_signed(values: Tensor, scheme: Scheme) -> Tensor:
    """Return signed integers of some bits as codes that count from zero."""
    middle = int(2 ** (int(scheme.bits) - 1))
    return (values.to(torch.int16) + middle).to(torch.uint8)
