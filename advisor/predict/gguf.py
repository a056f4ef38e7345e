"""Sizes of GGUF files by the rules of llama.cpp's quantizer (``llama_tensor_get_type``).

The ``_s``, ``_m`` and ``_l`` file types mix block types by tensor and by layer; embeddings and
heads have rules of their own; rows that do not fill a block of 256 fall back to another type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.errors import InputError

if TYPE_CHECKING:
    from advisor.modelspec import ModelSpec
    from advisor.schemes import Scheme

_BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22),
    "q5_1": (32, 24), "q8_0": (32, 34), "iq4_nl": (32, 18), "q2_k": (256, 84), "q3_k": (256, 110),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip
"""Block type: (weights, bytes) of one block (llama.cpp, ggml-common.h)."""

_FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Used where a row is no multiple of 256 (llama.cpp, ``tensor_type_fallback``)."""

_SENTENCEPIECE_BYTES, _MERGES_BYTES = 24, 50
"""Metadata per vocabulary entry. A token costs 8 bytes of length, about 7 of text and 4 of type;
a SentencePiece one 4 of score more, a byte-pair one one to two merges of 8 + 9 bytes. Assumption,
from those lengths: the tokenizer itself is not needed to predict a size."""

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


def gguf_size(spec: ModelSpec, scheme: Scheme, *, before_2024: bool = False) -> GgufSize:
    """Compute the size of the file that llama.cpp's quantizer writes, without an importance matrix.

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
    linear_bytes = sum(
        count * row_bytes(block_type, inputs) * outputs
        for (block_type, inputs, outputs), count in _linear_types(spec, file_type).items()
    )
    embedding, head, others = _outer_bytes(spec, file_type)
    return GgufSize(
        tensor_bytes=linear_bytes + embedding + head + others,
        header_bytes=_header_bytes(spec),
        linear_bytes=linear_bytes,
        embedding_bytes=embedding,
        head_bytes=head,
    )


def row_bytes(block_type: str, inputs: int) -> int:
    """Return the bytes of one row, in the type that llama.cpp falls back to where it must."""
    block, size = _BLOCKS[block_type]
    if inputs % block:
        block_type = _FALLBACK.get(block_type, "f16")
        block, size = _BLOCKS[block_type]
        if inputs % block:
            block, size = _BLOCKS["f16"]
    return inputs // block * size


def _base_type(file_type: str) -> str:
    """Return the block type of tensors that no rule names."""
    for suffix in ("_2023", "_s", "_m", "_l"):
        file_type = file_type.removesuffix(suffix)
    return file_type


def _uses_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's pick: the first and last eighth, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _linear_types(spec: ModelSpec, file_type: str) -> Counter[tuple[str, int, int]]:
    heads = int(spec.text_config.get("num_attention_heads") or 1)
    kv_heads = spec.attention[0].kv_heads if spec.attention else heads
    facts = _Facts(
        layers=spec.blocks,
        sharing=heads // max(1, kv_heads),
        eight_experts=spec.experts == 8,
        falcon=spec.architecture == "FalconForCausalLM",
    )
    counted: Counter[tuple[str, int, int]] = Counter()
    fused = spec.architecture.startswith("Phi3")
    for linear in spec.linears:
        kind = _kind(linear.name, fused)
        block_type = _linear_type(kind, linear.block, file_type, facts)
        counted[block_type, linear.in_features, linear.out_features] += 1
    return counted


@dataclass(frozen=True, slots=True)
class _Facts:
    layers: int
    sharing: int
    eight_experts: bool
    falcon: bool


_KINDS = {
    "v_proj": "attn_v", "k_proj": "attn_k", "o_proj": "attn_output", "out_proj": "attn_output",
    "dense": "attn_output", "down_proj": "ffn_down", "w2": "ffn_down", "fc2": "ffn_down",
    "dense_4h_to_h": "ffn_down", "qkv_proj": "attn_qkv", "query_key_value": "attn_qkv",
    "c_attn": "attn_qkv", "q_proj": "attn_q",
}  # fmt: skip


def _kind(name: str, fused: bool) -> str:
    """Return llama.cpp's name of a tensor, where a rule speaks of it."""
    parent, _, last = name.rpartition(".")
    if last == "c_proj":
        return "attn_output" if parent.endswith("attn") else "ffn_down"
    return _KINDS.get(last, "other")


def _linear_type(kind: str, layer: int, file_type: str, facts: _Facts) -> str:
    base = _base_type(file_type)
    more = _uses_more_bits(layer, facts.layers)
    if file_type == "q2_k_2023" and kind not in ("attn_q", "attn_k"):
        base = "q3_k"  # until January 2024 only queries and keys had two bits
    if kind == "attn_v":
        return _value_type(base, layer, file_type, facts, more)
    if kind == "attn_k" and facts.eight_experts and base.endswith("_k"):
        return "q8_0"
    if kind == "ffn_down":
        return _down_type(base, layer, file_type, facts, more)
    if kind == "attn_output":
        if facts.falcon:
            return "q4_k" if file_type == "q3_k_l" else base
        if facts.eight_experts:
            small = ("q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m")
            return "q5_k" if file_type in small else base
        return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(file_type, base)
    if kind == "attn_qkv":
        mixed = {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}
        return mixed.get(file_type, base)
    return base


def _value_type(base: str, layer: int, file_type: str, facts: _Facts, more: bool) -> str:
    chosen = base
    if file_type == "q2_k":
        chosen = "q4_k" if facts.sharing >= 4 else "q3_k"
    elif file_type == "q3_k_m":
        chosen = "q5_k" if layer < 2 else "q4_k"
    elif file_type == "q3_k_l" or (file_type == "q4_k_s" and layer < 4):
        chosen = "q5_k"
    elif file_type in ("q4_k_m", "q5_k_m") and more:
        chosen = "q6_k"
    if facts.layers == 80 and facts.sharing == 8 and chosen in ("q3_k", "q4_k"):
        chosen = "q5_k"  # the 70B models share one value head among eight queries
    if facts.eight_experts and base.endswith("_k"):
        chosen = "q8_0"
    return chosen


def _down_type(base: str, layer: int, file_type: str, facts: _Facts, more: bool) -> str:
    early = layer < facts.layers // 16
    if file_type == "q2_k":
        return "q3_k"
    if file_type == "q3_k_m":
        if early:
            return "q5_k"
        return "q4_k" if not facts.falcon or more else "q3_k"
    if file_type == "q3_k_l":
        return "q4_k" if facts.falcon else "q5_k"
    if file_type == "q4_k_m" and facts.falcon:
        return "q6_k" if early else "q5_k" if more else "q4_k"
    if file_type in ("q4_k_m", "q5_k_m") and more:
        return "q6_k"
    if file_type == "q4_k_s" and not facts.falcon and layer < facts.layers // 8:
        return "q5_k"
    return base


def _outer_bytes(spec: ModelSpec, file_type: str) -> tuple[int, int, int]:
    """Return the bytes of the embedding, of the head, and of all that stays 32-bit."""
    base = _base_type(file_type)
    embedding = head = others = 0
    for tensor in spec.unquantized_tensors:
        if tensor.role == "embedding":
            kind = _head_type(spec, base, tensor.shape[1]) if spec.tied_embeddings else base
            embedding += tensor.shape[0] * row_bytes(kind, tensor.shape[1])
        elif tensor.role == "head":
            kind = _head_type(spec, base, tensor.shape[1])
            head += tensor.shape[0] * row_bytes(kind, tensor.shape[1])
        elif not tensor.name.startswith(_VISION):
            others += 4 * tensor.parameters
    return embedding, head, others


_VISION = ("vision_tower.", "multi_modal_projector.", "visual.", "model.vision", "model.visual")
"""Vision towers live in a file of their own (mmproj)."""


def _head_type(spec: ModelSpec, base: str, inputs: int) -> str:
    if base in ("f16", "f32", "q8_0"):
        return base
    falcon = spec.architecture == "FalconForCausalLM"
    if falcon or inputs % _BLOCKS[base][0]:
        return "q8_0"
    return "q6_k"


def _header_bytes(spec: ModelSpec) -> int:
    vocabulary = spec.vocabulary_size
    sentencepiece = vocabulary < 40_000 or spec.architecture.startswith("Gemma")
    per_token = _SENTENCEPIECE_BYTES if sentencepiece else _MERGES_BYTES
    blocks = max(1, spec.blocks)
    # Experts are stacked: a mixture has as many tensors as a dense model.
    tensors = (
        len(spec.unquantized_tensors)
        + 3 * blocks
        + sum(not linear.is_expert for linear in spec.linears)
    )
    return vocabulary * per_token + tensors * _TENSOR_INFO_BYTES + 1024
