"""Read a GGUF file: tensors under the model's own names, rows in the model's own order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError
from advisor.formats.base import Stored, TensorHeader
from advisor.formats.gguf import BLOCKS, FILE, from_blocks
from advisor.formats.gguf_names import ARCHITECTURES, deinterleave, from_gguf, rotary_heads
from advisor.numerics.gguf_blocks import BLOCK_TYPES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def find_gguf(path: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or the one of a folder; None without one.

    Raises:
        InputError: A folder holds several and none is called ``model.gguf``.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if (path / FILE).is_file():
        return path / FILE
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1 and not any(path.glob("*.safetensors")):
        names = ", ".join(file.name for file in found[:3])
        raise InputError(f"{path} holds {len(found)} GGUF files ({names}): give one of them.")
    return found[0] if len(found) == 1 and not any(path.glob("*.safetensors")) else None


def open_gguf(path: Path) -> Stored:
    """Return the headers of a GGUF file and how to read a tensor.

    Raises:
        InputError: The file is damaged, or of an architecture whose tensors have other names.
    """
    reader, architecture = _open(path)
    heads = _number(reader, f"{architecture}.attention.head_count")
    kv_heads = _number(reader, f"{architecture}.attention.head_count_kv", heads)
    headers: dict[str, TensorHeader] = {}
    tensors: dict[str, Any] = {}
    for tensor in reader.tensors:
        name = from_gguf(tensor.name)
        if name is None:
            continue
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        headers[name] = TensorHeader(shape, tensor.tensor_type.name, int(tensor.n_bytes))
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


def config_of_gguf(path: Path) -> dict[str, Any]:
    """Return the config.json that a GGUF file's metadata stands for, as far as shapes need it.

    Raises:
        InputError: The file is damaged, or of an architecture that is not known here.
    """
    reader, architecture = _open(path)
    classes = [name for name, known in ARCHITECTURES.items() if known == architecture]
    if not classes:
        known = ", ".join(sorted(set(ARCHITECTURES.values())))
        raise InputError(f"{path} is of architecture {architecture!r}: {known} are known here.")
    names = {tensor.name: tensor for tensor in reader.tensors}
    hidden = _number(reader, f"{architecture}.embedding_length")
    heads = _number(reader, f"{architecture}.attention.head_count")
    return {
        "architectures": [classes[0]],
        "hidden_size": hidden,
        "intermediate_size": _number(reader, f"{architecture}.feed_forward_length"),
        "num_hidden_layers": _number(reader, f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _number(reader, f"{architecture}.attention.head_count_kv", heads),
        "head_dim": _number(reader, f"{architecture}.attention.key_length", hidden // heads),
        "max_position_embeddings": _number(reader, f"{architecture}.context_length"),
        "vocab_size": int(names["token_embd.weight"].shape[-1]),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
    }


def _open(path: Path) -> tuple[Any, str]:
    """Return a file's reader and its architecture."""
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(path)
        return reader, str(reader.get_field("general.architecture").contents())
    except (ValueError, KeyError, AttributeError, IndexError, OSError) as error:
        raise InputError(f"{path} is no whole GGUF file ({error}). Write it again.") from error


def _number(reader: Any, key: str, default: int | None = None) -> int:
    """Return a number of the metadata."""
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise InputError(f"the GGUF file has no {key}. Write it again.")
        return default
    return int(field.contents())
