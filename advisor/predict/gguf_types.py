"""Which block type llama.cpp's quantizer gives a tensor (``llama_tensor_get_type``).

The ``_s``, ``_m`` and ``_l`` file types mix block types by tensor and by layer; embeddings and
heads have rules of their own; rows that do not fill a block of 256 fall back to another type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.modelspec import LinearSpec

_BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4), "f16": (1, 2), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22),
    "q5_1": (32, 24), "q8_0": (32, 34), "iq4_nl": (32, 18), "q2_k": (256, 84), "q3_k": (256, 110),
    "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
}  # fmt: skip
"""Block type: (weights, bytes) of one block (llama.cpp, ggml-common.h)."""

_FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
"""Used where a row is no multiple of 256 (llama.cpp, ``tensor_type_fallback``)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What of a model the rules depend on."""

    layers: int
    sharing: int
    eight_experts: bool
    falcon: bool


def row_bytes(block_type: str, inputs: int) -> int:
    """Return the bytes of one row, in the type that llama.cpp falls back to where it must."""
    block, size = _BLOCKS[stored_type(block_type, inputs)]
    return inputs // block * size


def stored_type(block_type: str, inputs: int) -> str:
    """Return the type that rows of so many weights are stored in: the type asked for, or less."""
    if inputs % _BLOCKS[block_type][0]:
        block_type = _FALLBACK.get(block_type, "f16")
    return "f16" if inputs % _BLOCKS[block_type][0] else block_type


def base_type(file_type: str) -> str:
    """Return the block type of tensors that no rule names."""
    for suffix in ("_2023", "_s", "_m", "_l"):
        file_type = file_type.removesuffix(suffix)
    return file_type


def module_types(file_type: str, linears: Sequence[LinearSpec]) -> dict[str, str]:
    """Return the block type that llama.cpp's quantizer gives each module of a Llama-like model.

    Args:
        file_type: ``q4_k_m`` and its like, or a block type for all modules.
        linears: The model's modules.

    Returns:
        Block type by module path, after the fallback where rows do not fill a block.
    """
    rows = {linear.name.rpartition(".")[2]: linear.out_features for linear in linears}
    experts = {linear.name.rpartition(".experts.")[2].partition(".")[0]
               for linear in linears if linear.is_expert}  # fmt: skip
    facts = Facts(
        layers=1 + max((linear.block for linear in linears), default=0),
        sharing=rows.get("q_proj", 1) // max(1, rows.get("k_proj", 1)),
        eight_experts=len(experts) == 8,
        falcon=False,
    )
    found = {}
    for linear in linears:
        fused = linear.name.endswith("gate_up_proj")
        kind = linear_type(tensor_kind(linear.name, fused), linear.block, file_type, facts)
        found[linear.name] = stored_type(kind, linear.in_features)
    return found


def commonest_type(parameters: Mapping[str, int]) -> str:
    """Return the block type of most weights, which decides the embedding's and the head's.

    Args:
        parameters: Weights by block type; empty before modules are chosen.
    """
    return max(parameters, key=lambda name: (parameters[name], name), default="q6_k")


def outer_type(role: str, base: str, inputs: int, *, tied: bool, falcon: bool = False) -> str:
    """Return the block type of an embedding or a head.

    Args:
        role: ``embedding`` or ``head``.
        base: The file's main block type.
        inputs: Weights of a row.
        tied: Whether the embedding is the head too.
        falcon: Whether the model is a Falcon.
    """
    if role == "embedding" and not tied:
        return stored_type(base, inputs)
    if base in ("f16", "f32", "q8_0"):
        return stored_type(base, inputs)
    if falcon or inputs % _BLOCKS[base][0]:
        return stored_type("q8_0", inputs)
    return stored_type("q6_k", inputs)


def _uses_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's pick: the first and last eighth, and every third layer between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


_KINDS = {
    "v_proj": "attn_v", "k_proj": "attn_k", "o_proj": "attn_output", "out_proj": "attn_output",
    "dense": "attn_output", "down_proj": "ffn_down", "w2": "ffn_down", "fc2": "ffn_down",
    "dense_4h_to_h": "ffn_down", "qkv_proj": "attn_qkv", "query_key_value": "attn_qkv",
    "c_attn": "attn_qkv", "q_proj": "attn_q",
}  # fmt: skip


def tensor_kind(name: str, fused: bool) -> str:
    """Return llama.cpp's name of a tensor, where a rule speaks of it."""
    parent, _, last = name.rpartition(".")
    if last == "c_proj":
        return "attn_output" if parent.endswith("attn") else "ffn_down"
    return _KINDS.get(last, "other")


def linear_type(kind: str, layer: int, file_type: str, facts: Facts) -> str:
    """Return the block type of a linear, before any fallback."""
    base = base_type(file_type)
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


def _value_type(base: str, layer: int, file_type: str, facts: Facts, more: bool) -> str:
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


def _down_type(base: str, layer: int, file_type: str, facts: Facts, more: bool) -> str:
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
