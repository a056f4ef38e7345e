"""Read a GGUF file: tensors under the model's own names, rows in the model's own order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError
from advisor.formats.base import Stored, TensorHeader
from advisor.formats.gguf import BLOCKS, FILE, from_blocks
from advisor.formats.gguf_names import deinterleave, from_gguf, rotary_heads
from advisor.numerics.gguf_blocks import BLOCK_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def has_gguf(folder: Path) -> bool:
    """Return whether a model's folder holds a GGUF file rather than safetensors."""
    return (folder / FILE).is_file()


def open_gguf(folder: Path) -> Stored:
    """Return the headers of a folder's GGUF file and how to read a tensor.

    Raises:
        InputError: The file is damaged, or of an architecture whose tensors have other names.
    """
    from gguf import GGUFReader

    path = folder / FILE
    try:
        reader: Any = GGUFReader(path)
        architecture = str(reader.get_field("general.architecture").contents())
        heads = int(reader.get_field(f"{architecture}.attention.head_count").contents())
        kv_heads = int(reader.get_field(f"{architecture}.attention.head_count_kv").contents())
    except (ValueError, KeyError, AttributeError, IndexError, OSError) as error:
        raise InputError(f"{path} is no whole GGUF file ({error}). Write it again.") from error
    headers: dict[str, TensorHeader] = {}
    tensors: dict[str, Any] = {}
    for tensor in reader.tensors:
        name = from_gguf(tensor.name)
        if name is None:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        headers[name] = TensorHeader(shape, tensor.tensor_type.name)
        tensors[name] = tensor

    def load(name: str) -> Tensor:
        own = name.removesuffix(BLOCKS)
        header, tensor = headers[own], tensors[own]
        turned = rotary_heads(architecture, own, heads, kv_heads)
        raw = torch.from_numpy(tensor.data.copy())
        if header.dtype in _PLAIN:
            values = raw.view(torch.uint8).reshape(-1).view(_PLAIN[header.dtype])
            return deinterleave(values.view(header.shape), turned)
        kind = header.dtype.lower()
        if kind not in BLOCK_TYPES:
            raise InputError(f"{path}: {own} is stored as {header.dtype}, which is not known here.")
        blocks = deinterleave(raw.view(torch.uint8).view(header.shape[0], -1), turned)
        return blocks if name.endswith(BLOCKS) else from_blocks(kind, blocks).dequantize()

    return Stored(headers, load)
