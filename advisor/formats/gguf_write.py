"""Write a model as one GGUF file that llama.cpp loads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError
from advisor.formats.base import HEAD, Stored
from advisor.formats.folder import sync_file
from advisor.formats.gguf import EMBEDDING, FILE, main_type, outer_weights
from advisor.formats.gguf_names import architecture_of, interleave, rotary_heads, to_gguf
from advisor.formats.gguf_tokenizer import add_tokenizer, read_tokenizer
from advisor.numerics.gguf_blocks import pack_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from advisor.numerics.quantized_weight import QuantizedWeight

_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k": 12, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25,
}  # fmt: skip
"""llama.cpp's ``general.file_type``; of k-quants the medium mixture. Only shown to people."""
_QUANTIZATION_VERSION = 2


def gguf_problems(source: Path, config: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Return why a model cannot be written as GGUF: architecture, tensors, rope, tokenizer.

    Args:
        source: Folder of the 16-bit model.
        config: Its config.json.
        names: Its tensors.
    """

    def tensors() -> None:
        architecture_of(config)
        for name in names:
            to_gguf(name)

    problems = []
    for check in (tensors, lambda: read_tokenizer(source)):
        try:
            check()
        except InputError as error:
            problems.append(str(error))
    rope = _rope(config)
    if rope.get("type") not in (None, "default", "linear", "llama3"):
        problems.append(
            f"GGUF files are written with default, linear or llama3 rope, but this model has "
            f"{rope['type']!r}. Use llama.cpp's convert_hf_to_gguf.py for it."
        )
    return problems


def write_gguf(
    source: Path,
    folder: Path,
    config: Mapping[str, Any],
    stored: Stored,
    weights: Mapping[str, QuantizedWeight],
    replaced: Mapping[str, Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write ``model.gguf`` into a folder.

    Args:
        source: Folder of the 16-bit model: tokenizer and chat template.
        folder: Where the file goes.
        config: The model's config.json.
        stored: The model's tensors.
        weights: Quantized modules, in GGUF block types.
        replaced: Tensors that take the place of the source's; embedding and head excepted, which
            are quantized from the source where they are not among ``weights``.
        progress: Called with tensors done and in all.

    Returns:
        The file's sha256, by its name.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    architecture = architecture_of(config)
    tied = bool(config.get("tie_word_embeddings")) or f"{HEAD}.weight" not in stored.headers
    names = [name for name in sorted(stored.headers) if not (tied and name == f"{HEAD}.weight")]
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)
    outer = _outer(stored, names, weights, tied)
    path = folder / FILE
    writer: Any = GGUFWriter(path, architecture)
    _add_metadata(writer, source, config, weights)
    add_tokenizer(writer, source, config)
    if (factors := _rope_factors(config)) is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    for done, name in enumerate(names, start=1):
        quantized = outer.get(name, weights.get(name.removesuffix(".weight")))
        if quantized is not None:
            kind = quantized.scheme.weight
            rows = pack_blocks(kind, quantized.codes, quantized.extras)
        else:
            tensor = stored.load(name)
            tensor = replaced[name].to("cpu") if name in replaced else tensor
            kind, rows = _plain(tensor, stored.headers[name].dtype)
        rows = interleave(rows, rotary_heads(architecture, name, heads, kv_heads))
        writer.add_tensor(to_gguf(name), rows.numpy(), raw_dtype=GGMLQuantizationType[kind.upper()])
        if progress is not None:
            progress(done, len(names))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {FILE: sync_file(path)}


def _outer(
    stored: Stored, names: Sequence[str], weights: Mapping[str, QuantizedWeight], tied: bool
) -> dict[str, QuantizedWeight]:
    if not weights:
        return {}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in (f"{EMBEDDING}.weight", f"{HEAD}.weight"):
            if name in names:
                yield name, stored.load(name)

    return dict(outer_weights(tensors(), weights, tied=tied))


def _plain(tensor: Tensor, dtype: str) -> tuple[str, Tensor]:
    """Return type and bytes of a tensor that is not quantized: vectors in float32."""
    if tensor.dim() == 1 or dtype not in ("F16", "BF16"):
        return "f32", tensor.to(torch.float32).contiguous().view(torch.uint8)
    target = torch.float16 if dtype == "F16" else torch.bfloat16
    return dtype.lower(), tensor.to(target).contiguous().view(torch.uint8)


def _add_metadata(
    writer: Any, source: Path, config: Mapping[str, Any], weights: Mapping[str, QuantizedWeight]
) -> None:
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    head_size = int(config.get("head_dim") or hidden // heads)
    writer.add_name(source.resolve().name)
    writer.add_file_type(_FILE_TYPES[main_type(weights)] if weights else 32)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["theta"]))
    if rope.get("type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the position encoding's settings, wherever a configuration keeps them."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    return given | {"theta": theta, "type": given.get("rope_type") or given.get("type")}


def _rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Return Llama 3's divisor of every frequency, float32 [head size / 2], or None.

    Reference: Llama 3.1's rope scaling: long waves are divided by ``factor``, short ones kept,
    those between are blended.
    """
    rope = _rope(config)
    if rope.get("type") != "llama3":
        return None
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    factor, low = float(rope["factor"]), float(rope["low_freq_factor"])
    high, context = float(rope["high_freq_factor"]), float(rope["original_max_position_embeddings"])
    factors = []
    for index in range(0, size, 2):
        wave = 2 * math.pi * float(rope["theta"]) ** (index / size)
        blend = min(1.0, max(0.0, (context / wave - low) / (high - low)))
        factors.append(1 / ((1 - blend) / factor + blend))
    return torch.tensor(factors, dtype=torch.float32)
