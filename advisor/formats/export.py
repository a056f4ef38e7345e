"""Write a quantized checkpoint: tensors, config.json, tokenizer; the same bytes every time."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from advisor.errors import InputError, join_errors
from advisor.formats.base import HEAD, Stored, list_some
from advisor.formats.folder import atomic_folder, check_output, sync_file, write_text
from advisor.formats.gguf_write import gguf_problems, write_gguf
from advisor.formats.layouts import HEADS, is_transposed, layout_problems
from advisor.formats.registry import get_format
from advisor.formats.stored import open_stored
from advisor.models.config_file import read_config
from advisor.predict.size import SHARD_BYTES

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from advisor.formats.base import CheckpointFormat
    from advisor.numerics.quantized_weight import QuantizedWeight

__all__ = ["SHARD_BYTES", "check_output", "write_checkpoint"]
logger = logging.getLogger(__name__)

_COPIED = (
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_COPIED_FOLDERS = ("additional_chat_templates",)
_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe|shared)$")
_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
Progress = Callable[[int, int], None]


def write_checkpoint(
    source: Path,
    output: Path,
    *,
    format: str,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write a checkpoint that the format's loaders read.

    Args:
        source: Folder of the 16-bit model.
        output: Folder to make; it appears whole or not at all.
        format: Name of a format, see :mod:`advisor.formats.registry`.
        weights: Quantized linears, by module path. The others stay as they are.
        replaced: Tensors that take the place of the source's (folded scales), by tensor name.
        progress: Called with tensors done and in all.
        shard_bytes: A checkpoint larger than this is split into files of at most this size.

    Returns:
        sha256 of each tensor file, by file name, sorted.

    Raises:
        InputError: The output is in use or cannot be written, a name or shape does not belong to
            the model, or the format cannot hold a scheme. Nothing is written then.
    """
    replaced = replaced or {}
    check_output(output)
    checkpoint_format = get_format(format)
    config = read_config(source)
    stored = open_stored(source)
    _check(source, config, stored, weights, replaced)
    schemes = {name: weight.scheme for name, weight in weights.items()}
    tied = _is_tied(config, stored)
    names = [name for name in sorted(stored.headers) if name not in tied]
    complaints = checkpoint_format.problems(weights) + layout_problems(config, format, schemes)
    if format == "gguf":
        complaints += gguf_problems(source, config, names)
    if complaints:
        raise InputError(join_errors(complaints))
    unquantized = [name for name in _linears(stored) if name not in weights]
    quantization: dict[str, Any] = {}
    if weights:
        quantization = checkpoint_format.quantization_config(weights, unquantized)
        if quantization:
            config["quantization_config"] = quantization
    dtype = _model_dtype(config)
    stored_replaced = {
        name: tensor.T if is_transposed(config, name) else tensor
        for name, tensor in replaced.items()
    }
    tensors = _tensors(
        names, stored, weights, stored_replaced, checkpoint_format, quantization, dtype, progress
    )
    with atomic_folder(output, needed_bytes=_upper_bound(stored, weights)) as folder:
        write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        if format == "gguf":
            digests = write_gguf(source, folder, config, stored, weights, replaced, progress)
        else:
            digests = _write_shards(folder, tensors, shard_bytes)
        for name in digests:
            # The writer keeps tensor files to their owner; servers often run as someone else.
            shutil.copymode(folder / "config.json", folder / name)
        _copy_companions(source, folder)
        for name, content in checkpoint_format.companions(quantization).items():
            write_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")
    logger.info("wrote %d tensor files to %s", len(digests), output)
    return digests


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy what a server needs beside the weights: tokenizer, templates, licence."""
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for name in _COPIED_FOLDERS:
        for path in sorted((source / name).glob("*.jinja")):
            (folder / name).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / name / path.name)


def _check(
    source: Path,
    config: Mapping[str, Any],
    stored: Stored,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Tensor],
) -> None:
    """Check that what is written belongs to the model.

    Raises:
        InputError: Lists all offenders.
    """
    complaints = []
    if "quantization_config" in config:
        complaints.append(
            f"{source} is quantized already (config.json has a quantization_config). "
            "Start from the 16-bit model."
        )
    unknown = [name for name in weights if f"{name}.weight" not in stored.headers]
    unknown += [name for name in replaced if name not in stored.headers]
    if unknown:
        complaints.append(f"{source} has no tensors for {list_some(unknown)}.")
    for name, weight in weights.items():
        header = stored.headers.get(f"{name}.weight")
        shape = None if header is None else header.shape
        if shape is not None and is_transposed(config, f"{name}.weight"):
            shape = shape[::-1]
        if shape is not None and shape != weight.shape:
            complaints.append(
                f"{name} has shape {list(shape)}, but its quantized weight {list(weight.shape)}."
            )
    for name, value in replaced.items():
        header = stored.headers.get(name)
        tensor = value.T if is_transposed(config, name) else value
        if header is not None and header.shape != tuple(tensor.shape):
            complaints.append(
                f"{name} has shape {list(header.shape)}, but its replacement {list(tensor.shape)}."
            )
    if complaints:
        raise InputError(join_errors(complaints))


def _linears(stored: Stored) -> list[str]:
    """Return every module with a matrix as its weight, the embeddings left out."""
    return [
        name
        for name in stored.modules_with(("weight",))
        if len(stored.headers[f"{name}.weight"].shape) == 2
        and (name in HEADS or not _EMBEDDING.search(name))
    ]


def _is_tied(config: Mapping[str, Any], stored: Stored) -> set[str]:
    """Return tensors that are not stored because they are the embedding."""
    tied = config.get("tie_word_embeddings", False)
    return {f"{HEAD}.weight"} & set(stored.headers) if tied else set()


def _model_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """Return the data type that the model is loaded in."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else torch.bfloat16


def _upper_bound(stored: Stored, weights: Mapping[str, QuantizedWeight]) -> int:
    """Return bytes that the checkpoint will not exceed by much, to check the disk beforehand."""
    total = 0
    for name, header in stored.headers.items():
        count = 1
        for size in header.shape:
            count *= size
        quantized = weights.get(name.removesuffix(".weight"))
        if quantized is None:
            total += count * _SIZES.get(header.dtype, 1)
        else:
            total += int(count * quantized.scheme.bits / 8) + quantized.scales.numel() * 2
    return total


def _tensors(
    names: Sequence[str],
    stored: Stored,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Tensor],
    checkpoint_format: CheckpointFormat,
    quantization: Mapping[str, Any],
    dtype: torch.dtype,
    progress: Progress | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors to store, in the order of their modules' names."""
    for done, name in enumerate(names, start=1):
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in weights:
            packed = checkpoint_format.pack(module, weights[module], quantization, dtype)
            yield from sorted(packed.items())
        elif name in replaced:
            original = stored.load(name).dtype
            yield name, replaced[name].detach().to("cpu", original).contiguous()
        else:
            yield name, stored.load(name).contiguous()
        if progress is not None:
            progress(done, len(names))


def _write_shards(
    folder: Path, tensors: Iterator[tuple[str, Tensor]], shard_bytes: int
) -> dict[str, str]:
    """Write tensors to as few files as the limit allows; return the sha256 of each."""
    shards: list[dict[str, int]] = []
    current: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if current and size + nbytes > shard_bytes:
            shards.append(_write_shard(folder, len(shards), current))
            current, size = {}, 0
        current[name] = tensor
        size += nbytes
    shards.append(_write_shard(folder, len(shards), current))
    digests: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / _shard_name(number)).rename(folder / file)
        digests[file] = sync_file(folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return digests


def _shard_name(number: int) -> str:
    """Return the name of a file whose final name is not known yet."""
    return f"shard-{number:05d}.tmp"


def _write_shard(folder: Path, number: int, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write one file; return the bytes of each of its tensors."""
    # One metadata key only: the writer does not keep several in a fixed order.
    save_file(dict(tensors), folder / _shard_name(number), metadata={"format": "pt"})
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
