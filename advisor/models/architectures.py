"""How the architectures that can be quantized differ: quirks as tables, not as code.

Which linears a block has, what they read and what engines fuse is in
:mod:`advisor.modelspec.architectures`, which needs no torch. Here is what only a loaded model
needs: which producers take up a rescaling of inputs, what comes after the last block, and where
transformers holds weights in another way than the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean
from advisor.modelspec.architectures import BY_ARCHITECTURE

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class FoldPart:
    """What produces an input group and can absorb the inverse of a scaling of it.

    Attributes:
        input_group: The input group inside the block, as in the table of linears; ``{expert}``
            stands for every expert.
        producer: Norm or linear inside the block whose output channels are those inputs.
        kind: ``norm`` or ``linear``.
        part: Of a fused linear producer, which run of rows as long as the group makes it.
        when: Flag of the configuration, as in the table of linears. ``full_heads``: only where
            every query head has a key/value head of its own.
    """

    input_group: str
    producer: str
    kind: str
    part: int | None = None
    when: str = "yes"


@dataclass(frozen=True, slots=True)
class Experts:
    """Where a mixture keeps its experts, and what the checkpoint calls them.

    Attributes:
        path: The experts inside a block of the loaded model.
        gate: Name of an expert's gate in the checkpoint.
        up: Name of its up-projection.
        down: Name of its down-projection.
        stored_as: Name that the checkpoint has for the first part of ``path``.
    """

    path: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stored_as: str = "mlp"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a loaded model of one family of decoders needs beside the table of linears.

    Attributes:
        blocks: Path of the list of blocks.
        embedding: Path of the token embedding.
        head: Path of the output projection in the loaded model; GPT-NeoX stores ``embed_out``.
        final: Paths of what comes between the last block and the head; absent ones are skipped.
        folds: Which input groups have a producer that scales fold into.
        norm_offset: What the norm adds to its stored weight (Gemma multiplies by ``1 + w``).
        experts: Where the experts of a mixture are; None in dense models.
        transposed: Whether linears are stored as [in, out] (the Conv1D of GPT-2).
        writers: Linears of a block whose outputs are added to the residual stream as they are;
            empty where something stands between, a norm also subtracts the mean, or a router reads
            the stream, so that it cannot be rotated.
        returns_tuple: Whether a block's output is a tuple that begins with the hidden states.
    """

    blocks: str
    head: str
    final: tuple[str, ...]
    folds: tuple[FoldPart, ...]
    norm_offset: float = 0.0
    experts: Experts | None = None
    transposed: bool = False
    writers: tuple[str, ...] = ()
    returns_tuple: bool = False
    embedding: str = "model.embed_tokens"

    @property
    def final_norm(self) -> str:
        """Path of the norm before the head."""
        return self.final[0]


_QKV, _OUTPUT = "self_attn.qkv", "self_attn.o_proj"
_VALUES = FoldPart(_OUTPUT, "self_attn.v_proj", "linear", when="full_heads")
_DOWN = FoldPart("mlp.down_proj", "mlp.up_proj", "linear")


def _norm(group: str, producer: str, when: str = "yes") -> FoldPart:
    return FoldPart(group, producer, "norm", when=when)


def _llama_folds(mlp_norm: str = "post_attention_layernorm") -> tuple[FoldPart, ...]:
    """Foldings of the Llama layout; ``mlp_norm`` is the norm in front of the MLP."""
    return (_norm(_QKV, "input_layernorm"), _VALUES, _norm("mlp.gate_up", mlp_norm), _DOWN)


_EXPERT = "mlp.experts.{expert}"
_LLAMA = Architecture(
    "model.layers", "lm_head", ("model.norm",), _llama_folds(),
    writers=("self_attn.o_proj", "mlp.down_proj"),
)  # fmt: skip
_GEMMA = replace(_LLAMA, norm_offset=1.0)
# Gemma 2 and 3 also normalise what attention and MLP put out; the MLP's own norm is another.
_GEMMA2 = replace(_GEMMA, writers=(), folds=_llama_folds("pre_feedforward_layernorm"))
# The norm before a mixture also feeds the router, and what the experts read is not scaled alike.
_MIXTURE = replace(
    _LLAMA,
    folds=(
        *_llama_folds(),
        FoldPart(f"{_EXPERT}.down_proj", f"{_EXPERT}.up_proj", "linear"),
        FoldPart("mlp.shared_expert.down_proj", "mlp.shared_expert.up_proj", "linear"),
    ),
    experts=Experts(),
    writers=(),
)
_MIXTRAL = replace(
    _MIXTURE,
    folds=(
        *_llama_folds()[:2],
        FoldPart("block_sparse_moe.experts.{expert}.w2", "block_sparse_moe.experts.{expert}.w3",
                 "linear"),
    ),
    experts=Experts("mlp.experts", "w1", "w3", "w2", "block_sparse_moe"),
)  # fmt: skip
# What a block reads is the residual stream itself, or values through a norm without weights.
_POST_NORM = replace(_LLAMA, writers=(), folds=(_VALUES, _DOWN))
_PARALLEL = replace(_LLAMA, writers=(), folds=(_norm(_QKV, "input_layernorm"), _VALUES, _DOWN))
_PHI3 = replace(
    _LLAMA,
    folds=(
        _norm("self_attn.qkv_proj", "input_layernorm"),
        FoldPart(_OUTPUT, "self_attn.qkv_proj", "linear", part=2, when="full_heads"),
        _norm("mlp.gate_up_proj", "post_attention_layernorm"),
        FoldPart("mlp.down_proj", "mlp.gate_up_proj", "linear", part=1),
    ),
)
_STABLELM = replace(
    _PARALLEL,
    folds=(
        *_PARALLEL.folds,
        _norm("mlp.gate_up", "post_attention_layernorm", when="!use_parallel_residual"),
    ),
)
_STARCODER2 = replace(
    _PARALLEL,
    folds=(
        _norm(_QKV, "input_layernorm"), _VALUES, _norm("mlp.c_fc", "post_attention_layernorm"),
    ),
)  # fmt: skip
_PHI = replace(
    _PARALLEL,
    final=("model.final_layernorm",),
    folds=(
        _norm(_QKV, "input_layernorm"),
        FoldPart("self_attn.dense", "self_attn.v_proj", "linear", when="full_heads"),
    ),
)
_OPT = Architecture(
    "model.decoder.layers",
    "lm_head",
    ("model.decoder.final_layer_norm", "model.decoder.project_out"),
    (
        _norm(_QKV, "self_attn_layer_norm", when="pre_norm"),
        FoldPart("self_attn.out_proj", "self_attn.v_proj", "linear"),
        _norm("fc1", "final_layer_norm", when="pre_norm"),
        # ReLU(s x) = s ReLU(x) for s > 0.
        FoldPart("fc2", "fc1", "linear", when="relu"),
    ),
    embedding="model.decoder.embed_tokens",
)
_GPT2 = Architecture(
    "transformer.h",
    "lm_head",
    ("transformer.ln_f",),
    (
        _norm("attn.c_attn", "ln_1"),
        FoldPart("attn.c_proj", "attn.c_attn", "linear", part=2),
        _norm("mlp.c_fc", "ln_2"),
    ),
    transposed=True,
    embedding="transformer.wte",
)
_GPT_NEOX = Architecture(
    "gpt_neox.layers",
    "lm_head",
    ("gpt_neox.final_layer_norm",),
    (
        _norm("attention.query_key_value", "input_layernorm"),
        _norm("mlp.dense_h_to_4h", "post_attention_layernorm"),
    ),
    embedding="gpt_neox.embed_in",
)
_FALCON = Architecture(
    "transformer.h",
    "lm_head",
    ("transformer.ln_f",),
    (
        _norm("self_attention.qkv", "input_layernorm", when="!two_norms"),
        _norm("self_attention.qkv", "ln_attn", when="two_norms"),
        _norm("mlp.dense_h_to_4h", "ln_mlp", when="two_norms"),
        _norm("mlp.dense_h_to_4h", "post_attention_layernorm", when="sequential"),
    ),
    returns_tuple=True,
    embedding="transformer.word_embeddings",
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "GraniteForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Phi3ForCausalLM": _PHI3,
    "ArceeForCausalLM": replace(
        _LLAMA,
        folds=(*_llama_folds()[:2], _norm("mlp.up_proj", "post_attention_layernorm")),
    ),
    "OlmoForCausalLM": _POST_NORM,
    "Olmo2ForCausalLM": _POST_NORM,
    "Olmo3ForCausalLM": _POST_NORM,
    "CohereForCausalLM": _PARALLEL,
    "StableLmForCausalLM": _STABLELM,
    "Starcoder2ForCausalLM": _STARCODER2,
    "PhiForCausalLM": _PHI,
    "OPTForCausalLM": _OPT,
    "GPT2LMHeadModel": _GPT2,
    "GPTNeoXForCausalLM": _GPT_NEOX,
    "FalconForCausalLM": _FALCON,
    "MixtralForCausalLM": _MIXTRAL,
    "Qwen2MoeForCausalLM": _MIXTURE,
    "Qwen3MoeForCausalLM": _MIXTURE,
    "OlmoeForCausalLM": _MIXTURE,
}
"""Every architecture that can be quantized, by ``architectures[0]`` of config.json."""


def get_architecture(name: str) -> Architecture:
    """Return what a loaded model of an architecture needs.

    Raises:
        InputError: It is unknown, or known to ``recommend`` only; the message lists those that
            can be tuned.
    """
    if name not in ARCHITECTURES:
        known = f"can be predicted but not yet tuned: {name!r}" if name in BY_ARCHITECTURE else (
            f"architecture {name!r} is not known.{did_you_mean(name, ARCHITECTURES)}"
        )  # fmt: skip
        raise InputError(f"{known} Known: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[name]
