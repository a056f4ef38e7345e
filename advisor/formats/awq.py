"""AWQ checkpoints in the gemm layout, as autoawq began them and vLLM and transformers read them.

A module has ``qweight`` int32 [in, out / 8], ``qzeros`` int32 [groups, out / 8] and ``scales``
[groups, out]. Only 4 bits, and one group size for the whole checkpoint. Loaders differ on
checkpoints without zero points, so a symmetric weight is stored with the constant zero point 8:
the same numbers, and every loader reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advisor.formats.base import (
    HEAD,
    Found,
    Stored,
    check_tensor,
    complain,
    exact_scales,
    first_fault,
    group_size_of,
    is_consecutive,
)
from advisor.numerics.packing import pack_awq, unpack_awq
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.formats.base import Planned

NAME = "awq"
SUFFIXES = ("qweight", "qzeros", "scales")


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored, one complaint per rule broken."""
    broken: dict[str, list[str]] = {}
    sizes: dict[int, list[str]] = {}
    for name, weight in weights.items():
        sizes.setdefault(group_size_of(weight.scheme), []).append(name)
        if rule := _broken_rule(weight):
            broken.setdefault(rule, []).append(name)
    complaints = complain(broken)
    if len(sizes) > 1:
        seen = ", ".join(f"{size} ({len(names)} modules)" for size, names in sorted(sizes.items()))
        complaints.append(
            f"format 'awq' has one group size for the whole checkpoint, but got {seen}. "
            "Use compressed-tensors for mixtures."
        )
    return complaints


def _broken_rule(weight: QuantizedWeight | Planned) -> str | None:
    """Return the rule that a weight breaks, or None."""
    scheme = weight.scheme
    if scheme.method == "hqq":
        return f"format 'awq' has integer zero points, not those of {scheme}; use hqq"
    if scheme.weight != "int4" or scheme.granularity not in ("group", "channel"):
        return f"format 'awq' holds int4 per group or channel, not {scheme}; use compressed-tensors"
    if scheme.activation is not None:
        return f"format 'awq' keeps 16-bit activations, not {scheme}"
    if not is_consecutive(weight):
        return f"format 'awq' has no act-order groups, as {scheme} has; use gptq"
    if weight.shape[0] % 8:
        return "format 'awq' needs out_features to be a multiple of 8"
    return None


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return what can be read back: zero points are always stored."""
    return Scheme(
        "awq",
        scheme.weight,
        granularity=scheme.granularity,
        group_size=scheme.group_size,
        symmetric=False,
    )


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return ``quantization_config``; modules that stay 16-bit are in a list of full names."""
    first = next(iter(weights.values()))
    return {
        "bits": 4,
        "group_size": group_size_of(first.scheme),
        "modules_to_not_convert": sorted({*unquantized, HEAD}),
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return none: every loader reads config.json."""
    del config
    return {}


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return ``qweight``, ``qzeros`` and ``scales`` of one module."""
    del config
    zero_points = weight.zero_points
    if zero_points is None:
        zero_points = torch.full_like(weight.scales, 8, dtype=torch.uint8)
    return {
        f"{name}.qweight": pack_awq(weight.codes),
        f"{name}.qzeros": pack_awq(zero_points),
        f"{name}.scales": exact_scales(weight.scales, dtype, name).t().contiguous(),
    }


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized: excluded names match as parts."""
    kept = config.get("modules_to_not_convert") or ()
    return name != HEAD and not any(part in name for part in kept)


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module with AWQ tensors, and check them against the configuration."""
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm":
        return Found({}, (f"awq of {bits} bits, version {version!r} is unknown: 4, gemm is.",))
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        return Found({}, (f"awq: group_size must be an integer, but is {group_size!r}.",))
    symmetric = not config.get("zero_point", True)
    scheme = Scheme(
        "awq",
        "int4",
        granularity="group" if group_size > 0 else "channel",
        group_size=group_size if group_size > 0 else -1,
        symmetric=symmetric,
    )
    kept = config.get("modules_to_not_convert") or ()
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    for name in stored.modules_with(SUFFIXES):
        if any(part in name for part in kept):
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        wrong = _check_module(name, group_size, symmetric, stored)
        faults.extend(wrong)
        if not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def _check_module(name: str, group_size: int, symmetric: bool, stored: Stored) -> list[str]:
    """Return the faults of one module's tensors."""
    weight = stored.headers.get(f"{name}.qweight")
    if weight is None or len(weight.shape) != 2:
        return [f"{name} has no qweight: the tensor '{name}.qweight' is missing or no matrix."]
    in_features, words = weight.shape
    size = group_size if group_size > 0 else in_features
    if in_features % size:
        return [f"{name}: group_size={size} does not divide in_features={in_features}."]
    wrong = [
        check_tensor(stored, name, "qweight", weight.shape, ("I32",)),
        check_tensor(stored, name, "scales", (in_features // size, words * 8)),
    ]
    if not symmetric:
        wrong.append(check_tensor(stored, name, "qzeros", (in_features // size, words), ("I32",)))
    return first_fault(wrong, f"config.json says group_size={group_size}")


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    zero_points = None
    if not scheme.symmetric:
        zero_points = unpack_awq(stored.load(f"{name}.qzeros"))
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_awq(stored.load(f"{name}.qweight")),
        scales=stored.load(f"{name}.scales").t().to(torch.float32).contiguous(),
        zero_points=zero_points,
    )
