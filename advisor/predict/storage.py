"""What each checkpoint format stores for one quantized linear: the tensors, to the byte.

Every function takes the in- and out-features of a linear and returns its parts. Packing and names
are those of the libraries that load the files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.schemes import Scheme

DTYPE_BYTES = {
    "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a module.

    Attributes:
        suffix: Name after the module's path.
        dtype: Data type as a safetensors header writes it.
        shape: Stored shape.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


Parts = tuple[Part, ...]

FORMAT_ALIASES = {
    "auto-gptq": "gptq", "gptqmodel": "gptq", "autoawq": "awq", "bnb": "bitsandbytes",
    "autoround": "auto-round", "bf16": "safetensors", "huggingface": "safetensors",
    "compressed_tensors": "compressed-tensors", "gpt-oss": "mxfp4", "finegrained-fp8": "fp8",
}  # fmt: skip


def module_parts(scheme: Scheme, format_name: str, in_features: int, out_features: int) -> Parts:
    """Return the tensors that a format stores for one linear, its bias not counted.

    Raises:
        InputError: The format is unknown or does not hold this scheme.
    """
    return _module_parts(scheme, canonical_format(format_name), in_features, out_features)


def canonical_format(name: str) -> str:
    """Return the format's own name.

    Raises:
        InputError: Unknown format.
    """
    text = FORMAT_ALIASES.get(name.lower(), name.lower())
    if text not in (*_WRITERS, "gguf"):
        known = (*_WRITERS, "gguf")
        raise InputError(
            f"unknown checkpoint format {name!r}.{did_you_mean(name, known)} "
            f"Known: {', '.join(sorted(known))}."
        )
    return text


@lru_cache(maxsize=8192)
def _module_parts(scheme: Scheme, format_name: str, inputs: int, outputs: int) -> Parts:
    if not scheme.is_quantized:
        dtype = {"fp32": "F32", "fp16": "F16"}.get(scheme.weight, "BF16")
        return (Part(".weight", dtype, (outputs, inputs)),)
    if scheme.target_bits is not None:
        # A mixture before its modules are chosen: scales are inside the target.
        codes = math.ceil(inputs * outputs * scheme.target_bits / 8)
        return (Part(".weight", "U8", (codes,)),)
    parts = _WRITERS[format_name](scheme, inputs, outputs) if format_name != "gguf" else None
    if parts is None:
        raise InputError(
            f"format {format_name!r} cannot store {str(scheme)!r}: it holds "
            f"{_HOLDS[format_name]}. Use another format or scheme."
        )
    return parts


def groups_of(scheme: Scheme, inputs: int) -> int:
    """Return the number of scales along a row."""
    if scheme.granularity == "group" and scheme.group_size:
        return math.ceil(inputs / scheme.group_size)
    return 1


def _gptq(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if not scheme.is_integer or scheme.method == "llm.int8":
        return None
    bits, groups = int(scheme.bits), groups_of(scheme, inputs)
    return (
        Part(".qweight", "I32", (math.ceil(inputs * bits / 32), outputs)),
        Part(".qzeros", "I32", (groups, math.ceil(outputs * bits / 32))),
        Part(".scales", "F16", (groups, outputs)),
        Part(".g_idx", "I32", (inputs,)),
    )


def _auto_round(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    parts = _gptq(scheme, inputs, outputs)
    return parts and parts[:3]  # AutoRound's own packing is GPTQ's without the group index


def _awq(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if scheme.weight != "int4" or scheme.activation is not None:
        return None
    groups = groups_of(scheme, inputs)
    return (
        Part(".qweight", "I32", (inputs, math.ceil(outputs / 8))),
        Part(".qzeros", "I32", (groups, math.ceil(outputs / 8))),
        Part(".scales", "F16", (groups, outputs)),
    )


def _compressed(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    groups = groups_of(scheme, inputs)
    scales = (outputs, groups) if scheme.granularity != "tensor" else (1,)
    static = (Part(".input_scale", "F32", (1,)),) if scheme.static_activation else ()
    if scheme.weight in ("mxfp4", "mxfp8", "nvfp4"):
        return _micro_scaled(scheme, inputs, outputs)
    if scheme.weight == "fp8":
        if scheme.granularity == "block" and scheme.group_size:
            size = scheme.group_size
            scales = (math.ceil(outputs / size), math.ceil(inputs / size))
        return (
            Part(".weight", "F8_E4M3", (outputs, inputs)),
            Part(".weight_scale", "BF16", scales),
            *static,
        )
    if not scheme.is_integer or scheme.method == "llm.int8":
        return None
    bits = int(scheme.bits)
    if scheme.activation is not None and bits == 8:  # int-quantized
        parts = [Part(".weight", "I8", (outputs, inputs)), Part(".weight_scale", "BF16", scales)]
        if scheme.symmetric is False:
            parts.append(Part(".weight_zero_point", "I8", scales))
        return (*parts, *static)
    parts = [
        Part(".weight_packed", "I32", (outputs, math.ceil(inputs * bits / 32))),
        Part(".weight_scale", "BF16", scales),
        Part(".weight_shape", "I64", (2,)),
    ]
    if scheme.symmetric is False:
        packed = math.ceil(outputs * bits / 32)
        parts.append(Part(".weight_zero_point", "I32", (packed, groups)))
    if scheme.activation_order:
        parts.append(Part(".weight_g_idx", "I32", (inputs,)))
    return tuple(parts)


def _micro_scaled(scheme: Scheme, inputs: int, outputs: int) -> Parts:
    if scheme.weight == "nvfp4":
        parts = [
            Part(".weight_packed", "U8", (outputs, math.ceil(inputs / 2))),
            Part(".weight_scale", "F8_E4M3", (outputs, math.ceil(inputs / 16))),
            Part(".weight_global_scale", "F32", (1,)),
        ]
        if scheme.activation is not None:
            parts.append(Part(".input_global_scale", "F32", (1,)))
        return tuple(parts)
    scale = Part(".weight_scale", "U8", (outputs, math.ceil(inputs / 32)))
    if scheme.weight == "mxfp8":
        return (Part(".weight", "F8_E4M3", (outputs, inputs)), scale)
    return (Part(".weight_packed", "U8", (outputs, math.ceil(inputs / 2))), scale)


def _mxfp4(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if scheme.weight != "mxfp4":
        return None
    groups = math.ceil(inputs / 32)
    return (
        Part("_blocks", "U8", (outputs, groups, 16)),
        Part("_scales", "U8", (outputs, groups)),
    )


def _fp8(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if scheme.weight != "fp8":
        return None
    size = scheme.group_size if scheme.granularity == "block" and scheme.group_size else 128
    scales = (math.ceil(outputs / size), math.ceil(inputs / size))
    return (
        Part(".weight", "F8_E4M3", (outputs, inputs)),
        Part(".weight_scale_inv", "F32", scales),
    )


def _bitsandbytes(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if scheme.method == "llm.int8":
        return (
            Part(".weight", "I8", (outputs, inputs)),
            Part(".SCB", "F32", (outputs,)),
            Part(".weight_format", "U8", ()),
        )
    if scheme.weight not in ("nf4", "fp4"):
        return None
    count = inputs * outputs
    size = scheme.group_size if scheme.granularity == "group" and scheme.group_size else 64
    blocks = math.ceil(count / size)
    state = (
        f'{{"quant_type": "{scheme.weight}", "blocksize": {size}, "dtype": "bfloat16", '
        f'"shape": [{outputs}, {inputs}]'
    )
    parts = [
        Part(".weight", "U8", (math.ceil(count / 2), 1)),
        Part(".weight.absmax", "U8" if scheme.double_quantization else "F32", (blocks,)),
        Part(".weight.quant_map", "F32", (16,)),
    ]
    if scheme.double_quantization:
        # The offset is printed as the shortest decimal of a double that holds a float32: 17 to 21
        # characters, by its value; 20 is the commonest.
        state += (
            ', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": ' + "0" * 20
        )
        parts.append(Part(".weight.nested_absmax", "F32", (math.ceil(blocks / 256),)))
        parts.append(Part(".weight.nested_quant_map", "F32", (256,)))
    name = f".weight.quant_state.bitsandbytes__{scheme.weight}"
    return (*parts, Part(name, "U8", (len(state) + 1,)))


def _hqq(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    if not scheme.is_integer or scheme.method == "llm.int8":
        return None
    bits = int(scheme.bits)
    groups = groups_of(scheme, inputs) * outputs
    width = math.ceil(inputs * outputs / groups)
    # HQQ packs 8-, 4- and 2-bit codes into bytes and ten 3-bit codes into an int32; 5 to 7 bits
    # occupy a byte. The rest are the module's settings, a tensor each.
    if bits == 3:
        codes, kind, packing = (math.ceil(groups / 10), width), "I32", "3bit_32"
    else:
        rows = {2: 4, 4: 2}.get(bits, 1)
        codes, kind, packing = (math.ceil(groups / rows), width), "U8", f"{8 // rows}bit_u8"
    word = "torch.int32" if bits == 3 else "torch.uint8"
    flags = (
        "channel_wise", "encoded_state_dict", "offload_meta", "optimize", "quant_scale",
        "quant_zero", "round_zero", "stores_quant_config", "view_as_float",
    )  # fmt: skip
    return (
        Part(".W_q", kind, codes),
        Part(".scale", "BF16", (groups, 1)),
        Part(".zero", "BF16", (groups, 1)),
        Part(".shape", "I64", (2,)),
        *(Part(f".{name}", "I32", ()) for name in ("nbits", "group_size", "axis")),
        Part(".packing", "U8", (len(packing),)),
        Part(".unpack_view_dtype", "U8", (len(word),)),
        Part(".compute_dtype", "U8", (len("torch.bfloat16"),)),
        *(Part(f".{flag}", "U8", ()) for flag in flags),
    )


def _plain(scheme: Scheme, inputs: int, outputs: int) -> Parts | None:
    return None


_WRITERS: dict[str, Callable[[Scheme, int, int], Parts | None]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
    "safetensors": _plain,
    "auto-round": _auto_round,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "hqq": _hqq,
}
_HOLDS = {
    "gptq": "integers of 2 to 8 bits",
    "awq": "int4 without activation quantization",
    "compressed-tensors": "integers, fp8, mxfp4, mxfp8 and nvfp4",
    "bitsandbytes": "nf4, fp4 and llm.int8",
    "safetensors": "16- and 32-bit weights only",
    "auto-round": "integers of 2 to 8 bits",
    "fp8": "fp8 weights",
    "mxfp4": "mxfp4 weights",
    "hqq": "integers",
    "gguf": "the gguf-... schemes",
}
