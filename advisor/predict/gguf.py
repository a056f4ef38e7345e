"""Sizes of GGUF files by the rules of llama.cpp's quantizer (``llama_tensor_get_type``).

The ``_s``, ``_m`` and ``_l`` file types mix block types by tensor and by layer; embeddings and
heads have rules of their own; rows that do not fill a block of 256 fall back to another type.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import InputError
from advisor.predict.gguf_types import (
    Facts,
    base_type,
    commonest_type,
    linear_type,
    outer_type,
    row_bytes,
    stored_type,
    tensor_kind,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.modelspec import ModelSpec
    from advisor.schemes import Scheme

_SENTENCEPIECE_BYTES, _MERGES_BYTES = 24, 50
"""Metadata per vocabulary entry. A token costs 8 bytes of length, about 7 of text and 4 of type;
a SentencePiece one 4 of score more, a byte-pair one one to two merges of 8 + 9 bytes. Assumption,
from those lengths, where the model's tokenizer is not at hand."""
_LENGTH_BYTES, _TYPE_BYTES, _SCORE_BYTES = 8, 4, 4

_TENSOR_INFO_BYTES = 62
"""Name, type, two dimensions and offset of one tensor, and half a 32-byte alignment."""


@dataclass(frozen=True, slots=True)
class GgufSize:
    """Bytes of a GGUF file, by part."""

    tensor_bytes: int
    header_bytes: int
    linear_bytes: int
    embedding_bytes: int
    head_bytes: int


def gguf_size(
    spec: ModelSpec,
    scheme: Scheme,
    outer: Mapping[str, str] | None = None,
    *,
    before_2024: bool = False,
) -> GgufSize:
    """Compute the size of the file that llama.cpp's quantizer writes, without an importance matrix.

    Args:
        spec: The model.
        scheme: A GGUF type, or 16-bit.
        outer: Block type by role (``embedding``, ``head``) where it is not llama.cpp's choice.
        before_2024: Use the older mixture of q2_k.

    Raises:
        InputError: The scheme is not a GGUF type.
    """
    if scheme.method == "gguf":
        file_type = scheme.weight
    elif scheme.weight in ("bf16", "fp16", "fp32"):
        file_type = "f32" if scheme.weight == "fp32" else "f16"
    else:
        raise InputError(
            f"format 'gguf' cannot store {str(scheme)!r}. Use a scheme such as gguf-q4_k_m."
        )
    if file_type == "q2_k" and before_2024:
        file_type = "q2_k_2023"
    linear_bytes = 0
    for (block_type, inputs, outputs), count in _linear_types(spec, file_type).items():
        linear_bytes += count * row_bytes(block_type, inputs) * outputs
    return _size(spec, linear_bytes, base_type(file_type), outer or {})


def mixture_size(
    spec: ModelSpec, schemes: Mapping[str, Scheme], outer: Mapping[str, str] | None = None
) -> GgufSize:
    """Compute the size of a file whose modules have a block type each; the others are 16-bit.

    Args:
        spec: The model.
        schemes: ``gguf-TYPE`` by module path.
        outer: Block type by role (``embedding``, ``head``) where it is not llama.cpp's choice.

    Raises:
        InputError: A scheme is no GGUF type.
    """
    linear_bytes = 0
    weights: Counter[str] = Counter()
    for linear in spec.linears:
        scheme = schemes.get(linear.name)
        if scheme is None or not scheme.is_quantized:
            linear_bytes += 2 * linear.parameters
            continue
        if scheme.method != "gguf":
            raise InputError(
                f"format 'gguf' cannot store {str(scheme)!r} ({linear.name}). "
                "Use schemes such as gguf-q4_k."
            )
        kind = stored_type(base_type(scheme.weight), linear.in_features)
        weights[kind] += linear.parameters
        linear_bytes += row_bytes(kind, linear.in_features) * linear.out_features
    return _size(spec, linear_bytes, commonest_type(weights), outer or {})


def _size(spec: ModelSpec, linear_bytes: int, base: str, outer: Mapping[str, str]) -> GgufSize:
    embedding, head, others = _outer_bytes(spec, base, outer)
    return GgufSize(
        tensor_bytes=linear_bytes + embedding + head + others,
        header_bytes=_header_bytes(spec),
        linear_bytes=linear_bytes,
        embedding_bytes=embedding,
        head_bytes=head,
    )


def _linear_types(spec: ModelSpec, file_type: str) -> Counter[tuple[str, int, int]]:
    heads = int(spec.text_config.get("num_attention_heads") or 1)
    kv_heads = spec.attention[0].kv_heads if spec.attention else heads
    facts = Facts(
        layers=spec.blocks,
        sharing=heads // max(1, kv_heads),
        eight_experts=spec.experts == 8,
        falcon=spec.architecture == "FalconForCausalLM",
    )
    counted: Counter[tuple[str, int, int]] = Counter()
    fused = spec.architecture.startswith("Phi3")
    for linear in spec.linears:
        kind = tensor_kind(linear.name, fused)
        block_type = linear_type(kind, linear.block, file_type, facts)
        counted[block_type, linear.in_features, linear.out_features] += 1
    return counted


def _outer_bytes(spec: ModelSpec, base: str, outer: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the bytes of the embedding, of the head, and of all that stays 32-bit."""
    sizes = {"embedding": 0, "head": 0}
    others = 0
    falcon = spec.architecture == "FalconForCausalLM"
    for tensor in spec.unquantized_tensors:
        if tensor.role in sizes:
            inputs = tensor.shape[1]
            kind = outer_type(tensor.role, base, inputs, tied=spec.tied_embeddings, falcon=falcon)
            if tensor.role in outer:
                kind = stored_type(base_type(outer[tensor.role]), inputs)
            sizes[tensor.role] += tensor.shape[0] * row_bytes(kind, inputs)
        elif not tensor.name.startswith(_VISION):
            others += 4 * tensor.parameters
    return sizes["embedding"], sizes["head"], others


_VISION = ("vision_tower.", "multi_modal_projector.", "visual.", "model.vision", "model.visual")
"""Vision towers live in a file of their own (mmproj)."""


def _header_bytes(spec: ModelSpec) -> int:
    vocabulary = spec.vocabulary_size
    tokenizer = _tokenizer_bytes(Path(spec.id), vocabulary)
    sentencepiece = vocabulary < 40_000 or spec.architecture.startswith("Gemma")
    per_token = _SENTENCEPIECE_BYTES if sentencepiece else _MERGES_BYTES
    blocks = max(1, spec.blocks)
    # Experts are stacked: a mixture has as many tensors as a dense model.
    tensors = (
        len(spec.unquantized_tensors)
        + 3 * blocks
        + sum(not linear.is_expert for linear in spec.linears)
    )
    if tokenizer is None:
        tokenizer = vocabulary * per_token
    return tokenizer + tensors * _TENSOR_INFO_BYTES + 1024


def _tokenizer_bytes(folder: Path, vocabulary: int) -> int | None:
    """Return the bytes of a model's own tokenizer and chat template; None where there is none."""
    path = folder / "tokenizer.json"
    try:
        modified = path.stat().st_mtime_ns
    except OSError:
        return None
    return _read_tokenizer(path, modified, vocabulary)


@lru_cache(maxsize=8)
def _read_tokenizer(path: Path, _modified: int, vocabulary: int) -> int | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        model = document["model"]
        tokens = {str(token) for token in model["vocab"]}
        tokens |= {str(entry["content"]) for entry in document.get("added_tokens") or ()}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no byte-pair tokenizer: the estimate per token must do
    count = max(vocabulary, len(tokens))
    total = sum(len(token.encode()) for token in tokens) + count * (_LENGTH_BYTES + _TYPE_BYTES)
    if model.get("byte_fallback"):
        total += count * _SCORE_BYTES
    else:
        total += sum(_LENGTH_BYTES + len(merge.encode()) for merge in merges)
    template = path.parent / "chat_template.jinja"
    return total + (template.stat().st_size if template.is_file() else 0)
