"""Where each architecture keeps its linears and norms: quirks as tables, not as code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class LinearPart:
    """One quantizable linear of a block.

    Attributes:
        name: Path inside the block, for example ``self_attn.q_proj``.
        input_group: Path-like key shared by the linears that read the same input.
        fused_group: Path-like key shared by the linears that engines fuse.
    """

    name: str
    input_group: str
    fused_group: str


@dataclass(frozen=True, slots=True)
class FoldPart:
    """What produces an input group and can absorb the inverse of a scaling of it.

    Attributes:
        input_group: The input group, as in :class:`LinearPart`.
        producer: Norm or linear inside the block whose output channels are those inputs.
        kind: ``norm`` or ``linear``.
        second_half: The producer is a fused linear and only its second half of rows counts.
        needs_full_heads: Only where every query head has a key/value head of its own.
    """

    input_group: str
    producer: str
    kind: str
    second_half: bool = False
    needs_full_heads: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """The layout of one family of decoder models.

    Attributes:
        blocks: Path of the list of blocks.
        embedding: Path of the token embedding.
        final_norm: Path of the norm before the head.
        head: Path of the output projection.
        parts: Linears of a block, in execution order.
        folds: Which input groups have a producer that scales fold into.
        norm_offset: What the norm adds to its stored weight (Gemma multiplies by ``1 + w``).
        writers: Linears of a block whose outputs are added to the residual stream as they are;
            empty where something stands between, so that the stream cannot be rotated.
    """

    blocks: str
    embedding: str
    final_norm: str
    head: str
    parts: tuple[LinearPart, ...]
    folds: tuple[FoldPart, ...]
    norm_offset: float = 0.0
    writers: tuple[str, ...] = ()


_LLAMA_PARTS = (
    LinearPart("self_attn.q_proj", "self_attn.qkv", "self_attn.qkv_proj"),
    LinearPart("self_attn.k_proj", "self_attn.qkv", "self_attn.qkv_proj"),
    LinearPart("self_attn.v_proj", "self_attn.qkv", "self_attn.qkv_proj"),
    LinearPart("self_attn.o_proj", "self_attn.o_proj", "self_attn.o_proj"),
    LinearPart("mlp.gate_proj", "mlp.gate_up", "mlp.gate_up_proj"),
    LinearPart("mlp.up_proj", "mlp.gate_up", "mlp.gate_up_proj"),
    LinearPart("mlp.down_proj", "mlp.down_proj", "mlp.down_proj"),
)
_PHI3_PARTS = (
    LinearPart("self_attn.qkv_proj", "self_attn.qkv_proj", "self_attn.qkv_proj"),
    LinearPart("self_attn.o_proj", "self_attn.o_proj", "self_attn.o_proj"),
    LinearPart("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.gate_up_proj"),
    LinearPart("mlp.down_proj", "mlp.down_proj", "mlp.down_proj"),
)


def _llama_folds(mlp_norm: str) -> tuple[FoldPart, ...]:
    """Foldings of the Llama layout; ``mlp_norm`` is the norm in front of the MLP."""
    return (
        FoldPart("self_attn.qkv", "input_layernorm", "norm"),
        FoldPart("self_attn.o_proj", "self_attn.v_proj", "linear", needs_full_heads=True),
        FoldPart("mlp.gate_up", mlp_norm, "norm"),
        FoldPart("mlp.down_proj", "mlp.up_proj", "linear"),
    )


def _decoder(
    parts: tuple[LinearPart, ...],
    folds: tuple[FoldPart, ...],
    norm_offset: float = 0.0,
    writers: tuple[str, ...] = ("self_attn.o_proj", "mlp.down_proj"),
) -> Architecture:
    """Return an architecture with the module names that all families below share."""
    return Architecture(
        blocks="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        parts=parts,
        folds=folds,
        norm_offset=norm_offset,
        writers=writers,
    )


_LLAMA = _decoder(_LLAMA_PARTS, _llama_folds("post_attention_layernorm"))
_GEMMA = _decoder(_LLAMA_PARTS, _llama_folds("post_attention_layernorm"), norm_offset=1.0)
# Gemma 2 and 3 also normalise what attention and MLP put out; the MLP's own norm is another.
_GEMMA2 = _decoder(
    _LLAMA_PARTS, _llama_folds("pre_feedforward_layernorm"), norm_offset=1.0, writers=()
)
_PHI3 = _decoder(
    _PHI3_PARTS,
    (
        FoldPart("self_attn.qkv_proj", "input_layernorm", "norm"),
        FoldPart("mlp.gate_up_proj", "post_attention_layernorm", "norm"),
        FoldPart("mlp.down_proj", "mlp.gate_up_proj", "linear", second_half=True),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Phi3ForCausalLM": _PHI3,
}
"""Every architecture that can be quantized, by ``architectures[0]`` of config.json."""


def get_architecture(name: str) -> Architecture:
    """Return the layout of an architecture.

    Raises:
        InputError: It is unknown; the message lists the known ones.
    """
    if name not in ARCHITECTURES:
        raise InputError(
            f"architecture {name!r} is not known.{did_you_mean(name, ARCHITECTURES)} "
            f"Known: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]
