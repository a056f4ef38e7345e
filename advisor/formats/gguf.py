"""GGUF: one file for llama.cpp, with blocks of codes, the tokenizer and the chat template."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.formats.base import HEAD, Found, Stored, list_some
from advisor.formats.read_only import companions as companions
from advisor.formats.read_only import quantization_config as quantization_config
from advisor.methods.gguf import assemble, quantize_blocks
from advisor.numerics.gguf_blocks import BLOCK_TYPES, get_block_type, unpack_blocks
from advisor.predict.gguf_types import base_type, commonest_type, outer_type
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from torch import Tensor

    from advisor.formats.base import Planned
    from advisor.numerics.quantized_weight import QuantizedWeight

NAME = "gguf"
FILE = "model.gguf"
SUFFIXES = ("weight",)
BLOCKS = "#blocks"
"""Added to a tensor's name to load the bytes of its blocks, rows in the model's order."""
EMBEDDING = "model.embed_tokens"


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored: GGUF holds its own block types only."""
    others = [name for name, weight in weights.items() if weight.scheme.method != "gguf"]
    if not others:
        return []
    return [
        f"format 'gguf' holds GGUF block types only, but {list_some(others)} is "
        f"{weights[others[0]].scheme}. Use schemes such as gguf-q4_k_m."
    ]


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return the block type of a scheme; a file type's own one."""
    return Scheme("gguf", base_type(scheme.weight))


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Never called: a GGUF file is written whole, by :mod:`advisor.formats.gguf_write`.

    Raises:
        InputError: Always.
    """
    del weight, config, dtype
    raise InputError(f"{name}: a GGUF file is written whole, not module by module.")


def main_type(weights: Mapping[str, QuantizedWeight]) -> str:
    """Return the block type of most weights of the blocks, embedding and head not counted."""
    counted: Counter[str] = Counter()
    for name, weight in weights.items():
        if name not in (EMBEDDING, HEAD):
            counted[weight.scheme.weight] += weight.codes.numel()
    return commonest_type(counted)


def outer_weights(
    tensors: Iterator[tuple[str, Tensor]], weights: Mapping[str, QuantizedWeight], *, tied: bool
) -> Iterator[tuple[str, QuantizedWeight]]:
    """Quantize embedding and head as llama.cpp does; a type of 16 bits leaves a tensor out.

    Args:
        tensors: Name and value of the embedding's and the head's weights.
        weights: The quantized modules; the commonest type of the blocks' decides. An end that is
            among them is left out.
        tied: Whether the embedding is the head too.

    Yields:
        Tensor name and its quantized weight.
    """
    for name, tensor in tensors:
        kind = outer_kind(name.removesuffix(".weight"), tensor.shape[1], weights, tied=tied)
        if kind is not None:
            yield name, quantize_blocks(tensor.detach().float(), Scheme("gguf", kind))


def outer_kind(
    name: str, inputs: int, weights: Mapping[str, QuantizedWeight], *, tied: bool
) -> str | None:
    """Return the block type that llama.cpp gives an embedding or a head; None for 16 bits.

    Args:
        name: Module path.
        inputs: Weights of a row.
        weights: The quantized modules. An end that is among them is asked for no more.
        tied: Whether the embedding is the head too.
    """
    if name in weights or not any(weight.scheme.method == "gguf" for weight in weights.values()):
        return None
    role = "embedding" if name.startswith(EMBEDDING) else "head"
    kind = outer_type(role, main_type(weights), inputs, tied=tied)
    return kind if kind in BLOCK_TYPES else None


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return False: the file says itself what each tensor is."""
    del name, config
    return False


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Return every linear whose weight is in blocks; embedding and head are no modules."""
    del config
    modules = {}
    faults = []
    for name, header in stored.headers.items():
        module = name.removesuffix(".weight")
        kind = header.dtype.lower()
        if len(header.shape) != 2 or module in (EMBEDDING, HEAD) or kind in _PLAIN:
            continue
        if kind in BLOCK_TYPES:
            modules[module] = Scheme("gguf", kind)
        else:
            faults.append(f"{module} is stored as {header.dtype}, which is not known here.")
    return Found(modules, tuple(faults))


_PLAIN = ("f32", "f16", "bf16")


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    get_block_type(scheme.weight)
    return from_blocks(scheme.weight, stored.load(f"{name}.weight{BLOCKS}"))


def from_blocks(kind: str, blocks: Tensor) -> QuantizedWeight:
    """Return the weight of a tensor's bytes.

    Args:
        kind: Block type.
        blocks: uint8 [out, blocks · size].
    """
    codes, fields = unpack_blocks(kind, blocks)
    return assemble(Scheme("gguf", kind), codes, fields)
