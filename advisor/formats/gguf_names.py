"""What GGUF calls a model's tensors, and the order of rows that llama.cpp expects."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

ARCHITECTURES: dict[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""transformers' class to GGUF's architecture, for those whose tensors map one to one."""

_OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BLOCK_BACK = {value: key for key, value in _BLOCK.items()}
_OUTER_BACK = {value: key for key, value in _OUTER.items()}


def architecture_of(config: Mapping[str, Any]) -> str:
    """Return GGUF's name of a model's architecture.

    Raises:
        InputError: It has none here.
    """
    names = config.get("architectures") or [""]
    if str(names[0]) not in ARCHITECTURES:
        raise InputError(
            f"GGUF files are written for {', '.join(ARCHITECTURES)}, but got {names[0]!r}. "
            "Use llama.cpp's convert_hf_to_gguf.py and llama-quantize for this model."
        )
    return ARCHITECTURES[str(names[0])]


def to_gguf(name: str) -> str:
    """Return GGUF's name of a tensor.

    Raises:
        InputError: It has none.
    """
    module, _, leaf = name.rpartition(".")
    if module in _OUTER:
        return f"{_OUTER[module]}.{leaf}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None or match[2] not in _BLOCK:
        raise InputError(f"the tensor {name!r} has no place in a GGUF file of this architecture.")
    return f"blk.{match[1]}.{_BLOCK[match[2]]}.{leaf}"


def from_gguf(name: str) -> str | None:
    """Return the model's name of a GGUF tensor; None where it has no counterpart (rope_freqs)."""
    module, _, leaf = name.rpartition(".")
    if module in _OUTER_BACK:
        return f"{_OUTER_BACK[module]}.{leaf}"
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    if match is None or match[2] not in _BLOCK_BACK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK_BACK[match[2]]}.{leaf}"


def rotary_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """Return the number of heads whose rows are reordered in a tensor; 0 where none are.

    Args:
        architecture: GGUF's.
        name: The model's tensor name.
        heads: Query heads.
        kv_heads: Key heads.
    """
    if architecture != "llama":
        return 0
    if ".q_proj." in name:
        return heads
    return kv_heads if ".k_proj." in name else 0


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Reorder each head's rows from halves (as transformers rotates) to pairs (as llama.cpp does).

    Args:
        rows: [heads · size, ...], also of packed rows.
        heads: Number of heads; 0 leaves the rows as they are.
    """
    if not heads:
        return rows
    shaped = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return shaped.transpose(1, 2).reshape(rows.shape).contiguous()


def deinterleave(rows: Tensor, heads: int) -> Tensor:
    """Undo :func:`interleave`."""
    if not heads:
        return rows
    shaped = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return shaped.transpose(1, 2).reshape(rows.shape).contiguous()
