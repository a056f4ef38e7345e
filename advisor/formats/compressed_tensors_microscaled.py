"""compressed-tensors' formats of NVFP4, MXFP4 and MXFP8: the tensors of one module.

``nvfp4-pack-quantized``: two E2M1 codes a byte, E4M3 scales per 16 inputs, a float32 scale of the
whole weight by which those are divided, and the same of the inputs. ``mxfp4-pack-quantized``: the
same codes, E8M0 exponents per 32 inputs. ``mxfp8-quantized``: E4M3 codes, E8M0 exponents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.formats.base import check_tensor, first_fault
from advisor.numerics.codebooks import encode_e4m3
from advisor.numerics.microscaling import (
    MX_WIDTH,
    NVFP4_WIDTH,
    decode_e8m0,
    e2m1_codebook,
    encode_e8m0,
    pack_e2m1,
    unpack_e2m1,
)
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from advisor.formats.base import Stored
    from advisor.schemes import Scheme


def pack(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors of one module, by full name."""
    kind = weight.scheme.weight
    if kind == "mxfp8":
        tensors = {f"{name}.weight": weight.codes.contiguous().view(torch.float8_e4m3fn)}
    else:
        tensors = {f"{name}.weight_packed": pack_e2m1(weight.codes)}
    if kind != "nvfp4":
        return tensors | {f"{name}.weight_scale": encode_e8m0(weight.scales).contiguous()}
    # Fused linears share these tensors, which a file may hold only once each: copies.
    global_ = weight.extras["global_scale"].to(torch.float32, copy=True)
    # Off by one rounding of float32 at most, which E4M3's three bits of mantissa do not see.
    local = encode_e4m3(weight.scales * global_).view(torch.float8_e4m3fn)
    tensors[f"{name}.weight_scale"] = local.contiguous()
    tensors[f"{name}.weight_global_scale"] = global_.contiguous()
    if weight.scheme.activation is not None:
        scale = weight.extras["input_global_scale"].to(torch.float32, copy=True)
        tensors[f"{name}.input_global_scale"] = scale.contiguous()
    return tensors


def check(name: str, scheme: Scheme, stored: Stored) -> list[str]:
    """Return the faults of one module's tensors."""
    main, per_byte, dtype = "weight_packed", 2, "U8"
    if scheme.weight == "mxfp8":
        main, per_byte, dtype = "weight", 1, "F8_E4M3"
    header = stored.headers.get(f"{name}.{main}")
    if header is None or len(header.shape) != 2:
        return [f"{name} has no {main}: the tensor '{name}.{main}' is missing."]
    out_features, in_features = header.shape[0], header.shape[1] * per_byte
    nvfp4 = scheme.weight == "nvfp4"
    width = NVFP4_WIDTH if nvfp4 else MX_WIDTH
    if in_features % width:
        return [f"{name}: groups of {width} do not divide in_features={in_features}."]
    scales = (out_features, in_features // width)
    kinds = ("F8_E4M3",) if nvfp4 else ("U8",)
    wrong = [
        check_tensor(stored, name, main, header.shape, (dtype,)),
        check_tensor(stored, name, "weight_scale", scales, kinds),
    ]
    if nvfp4:
        wrong.append(check_tensor(stored, name, "weight_global_scale", (1,), ("F32",)))
        if scheme.activation is not None:
            wrong.append(check_tensor(stored, name, "input_global_scale", (1,), ("F32",)))
    return first_fault(wrong, f"config.json says {scheme}")


def unpack(name: str, scheme: Scheme, stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    scales = stored.load(f"{name}.weight_scale")
    extras: dict[str, Tensor] = {}
    if scheme.weight == "nvfp4":
        extras["global_scale"] = stored.load(f"{name}.weight_global_scale")
        if scheme.activation is not None:
            extras["input_global_scale"] = stored.load(f"{name}.input_global_scale")
        values = scales.to(torch.float32) / extras["global_scale"]
    else:
        values = decode_e8m0(scales)
    if scheme.weight == "mxfp8":
        codes = stored.load(f"{name}.weight").view(torch.uint8)
        return QuantizedWeight(scheme=scheme, codes=codes, scales=values)
    codes = unpack_e2m1(stored.load(f"{name}.weight_packed"))
    codebook = e2m1_codebook()
    return QuantizedWeight(scheme, codes, values, codebook=codebook, extras=extras)
