"""GPTQ checkpoints, as auto-gptq began them and gptqmodel, vLLM and SGLang read them.

A module has ``qweight`` int32 [in * bits / 32, out], ``qzeros`` int32 [groups, out * bits / 32],
``scales`` [groups, out] and ``g_idx`` int32 [in]. ``checkpoint_format: gptq`` stores zero points
minus one; since 0 - 1 does not fit, checkpoints with a zero point of 0 are ``gptq_v2``, which
stores them as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advisor.errors import VerificationError
from advisor.formats.base import (
    HEAD,
    Found,
    Stored,
    check_tensor,
    complain,
    exact_scales,
    first_fault,
    is_consecutive,
)
from advisor.formats.gptq_config import build_config, resolve_rule, scheme_of
from advisor.formats.gptq_versions import stored_zero_points, true_zero_points, zeros_in_words
from advisor.numerics.packing import (
    pack_gptq,
    pack_gptq_zeros,
    unpack_gptq,
    unpack_gptq_zeros,
)
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.formats.base import Planned

NAME = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored, one complaint per rule broken."""
    broken: dict[str, list[str]] = {}
    for name, weight in weights.items():
        scheme = weight.scheme
        if rule := _broken_rule(scheme, weight.shape):
            broken.setdefault(rule, []).append(name)
    return complain(broken)


def _broken_rule(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Return the rule that a weight breaks, or None."""
    if not scheme.is_integer or scheme.method in ("llm.int8", "hqq"):
        return f"format 'gptq' holds integer weights and zero points, not {scheme}"
    if scheme.granularity not in ("group", "channel"):
        return f"format 'gptq' holds scales per group or channel, not {scheme}"
    if scheme.bits not in _BITS:
        return f"format 'gptq' holds 2, 3, 4 or 8 bits, not {scheme}; compressed-tensors does"
    if scheme.activation is not None:
        return f"format 'gptq' keeps 16-bit activations, not {scheme}; use compressed-tensors"
    if any(size * int(scheme.bits) % 32 for size in shape):
        return f"format 'gptq' needs in and out features × {scheme.bits:g} bits to fill int32 words"
    return None


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return what can be read back; act-order changes nothing where there is one group a row."""
    grouped = scheme.granularity == "group"
    return Scheme(
        "gptq",
        scheme.weight,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        activation_order=scheme.activation_order and grouped,
    )


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``, with the most common scheme as the default."""
    return build_config(weights, unquantized)


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return quantize_config.json, which auto-gptq looks for in a folder.

    It passes over what it does not know, so it gets none of a checkpoint that it would misread:
    with a quantized head, with overrides in ``dynamic``, or with the zero points of ``gptq_v2``.
    """
    if config.get("lm_head") or "dynamic" in config or config.get("checkpoint_format") != "gptq":
        return {}
    return {"quantize_config.json": {key: value for key, value in config.items()
                                     if key != "quant_method"}}  # fmt: skip


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of one module."""
    bits = int(weight.scheme.bits)
    groups, in_features = weight.scales.shape[1], weight.shape[1]
    zero_points = weight.zero_points
    if zero_points is None:
        zero_points = torch.full_like(weight.scales, 2 ** (bits - 1), dtype=torch.uint8)
    zero_points = stored_zero_points(zero_points, config)
    index = weight.group_index
    if index is None:
        index = torch.arange(in_features) // (in_features // groups)
    return {
        f"{name}.qweight": pack_gptq(weight.codes, bits),
        f"{name}.qzeros": pack_gptq_zeros(zero_points, bits),
        f"{name}.scales": exact_scales(weight.scales, dtype, name).t().contiguous(),
        f"{name}.g_idx": index.to(torch.int32).contiguous(),
    }


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized: ``dynamic`` does not exclude it."""
    return (name != HEAD or bool(config.get("lm_head"))) and resolve_rule(name, config) is not None


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module with GPTQ tensors, and check them against the configuration."""
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    if config.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        return Found({}, (f"unknown checkpoint_format {config['checkpoint_format']!r}.",))
    for name in stored.modules_with(SUFFIXES):
        rule = resolve_rule(name, config)
        if rule is None:
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        if rule["bits"] not in _BITS or not isinstance(rule["group_size"], int):
            faults.append(
                f"{name}: bits={rule['bits']}, group_size={rule['group_size']} is unknown."
            )
            continue
        wrong = _check_module(name, rule, stored)
        faults.extend(wrong)
        if not wrong:
            modules[name] = scheme_of(rule)
    return Found(modules, tuple(faults))


def _check_module(name: str, rule: Mapping[str, Any], stored: Stored) -> list[str]:
    """Return the faults of one module's tensors."""
    weight = stored.headers.get(f"{name}.qweight")
    if weight is None or len(weight.shape) != 2:
        return [f"{name} has no qweight: the tensor '{name}.qweight' is missing or no matrix."]
    bits = rule["bits"]
    in_features, out_features = weight.shape[0] * 32 // bits, weight.shape[1]
    index = stored.headers.get(f"{name}.g_idx")
    if index is not None and index.shape != (in_features,):
        return [
            f"{name}: qweight holds {in_features} inputs at {bits} bits, "
            f"but g_idx counts {list(index.shape)}."
        ]
    group_size = rule["group_size"] if rule["group_size"] > 0 else in_features
    if in_features % group_size:
        return [f"{name}: group_size={group_size} does not divide in_features={in_features}."]
    groups = in_features // group_size
    wrong = [
        check_tensor(stored, name, "qweight", weight.shape, ("I32",)),
        check_tensor(stored, name, "scales", (groups, out_features)),
        check_tensor(stored, name, "qzeros", (groups, -(-out_features * bits // 32)), ("I32",)),
    ]
    if rule["desc_act"] and index is None:
        wrong.append(f"{name} has no g_idx, which act-order needs.")
    return first_fault(wrong, f"config.json says bits={bits}, group_size={rule['group_size']}")


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module.

    Raises:
        VerificationError: Some loaders would read another weight than others: zero points of a
            symmetric module that are not the middle of the grid, or group indices that are not
            consecutive where the configuration says that there is no act-order.
    """
    bits = int(scheme.bits)
    qweight = stored.load(f"{name}.qweight")
    in_features, out_features = qweight.shape[0] * 32 // bits, qweight.shape[1]
    scales = stored.load(f"{name}.scales").t().to(torch.float32).contiguous()
    zero_points: Tensor | None = unpack_gptq_zeros(
        stored.load(f"{name}.qzeros"), bits, out_features
    )
    if zero_points is not None:
        zero_points = true_zero_points(zero_points, bits, config)
    if scheme.symmetric:
        if zero_points is not None and bool((zero_points != 2 ** (bits - 1)).any()):
            raise VerificationError(f"{name}: {zeros_in_words(zero_points, bits, config)}")
        zero_points = None
    index = None
    if f"{name}.g_idx" in stored.headers:
        index = stored.load(f"{name}.g_idx").to(torch.int32)
    weight = QuantizedWeight(
        scheme=scheme,
        codes=unpack_gptq(qweight, bits, in_features),
        scales=scales,
        zero_points=zero_points,
        group_index=index,
    )
    if scheme.activation_order:
        return weight
    if not is_consecutive(weight):
        raise VerificationError(
            f"{name}: config.json says desc_act=false, but g_idx is not consecutive."
        )
    return replace(weight, group_index=None)
