"""Architectures as a table: which modules a block has, and how their shapes follow from a config.

A size is a name of :func:`advisor.modelspec.dimensions.dimensions` ("hidden", "queries", ...), or
several joined by "+". A flag is a key of config.json, with the family's default; "yes" is always
true, "" never, and a leading "!" negates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

RowKind = Literal["linear", "conv1d", "embedding", "norm", "router", "parameter", "stacked"]


@dataclass(frozen=True, slots=True)
class Row:
    """One module (or bare parameter) of a table.

    Attributes:
        path: Path below the block, or the whole path outside the blocks.
        kind: ``linear`` stores [out, in], ``conv1d`` [in, out]; ``stacked`` is a parameter that
            holds one matrix [in, out] per expert; ``router`` and ``parameter`` stay 16-bit.
        sizes: For matrices (in, out), otherwise the shape.
        bias: Flag: whether there is a bias.
        reads: Suffix of the input group; the path itself where empty.
        fused: Suffix of the group that engines fuse; the path itself where empty.
        when: Flag: whether the row exists at all.
    """

    path: str
    kind: RowKind
    sizes: tuple[str, ...]
    bias: str = ""
    reads: str = ""
    fused: str = ""
    when: str = "yes"


def linear(
    path: str,
    inputs: str,
    outputs: str,
    bias: str = "",
    reads: str = "",
    fused: str = "",
    when: str = "yes",
) -> Row:
    """Return a row of a quantizable matrix."""
    return Row(path, "linear", (inputs, outputs), bias, reads, fused, when)


def norm(path: str, size: str = "hidden", bias: str = "", when: str = "yes") -> Row:
    """Return a row of a normalisation."""
    return Row(path, "norm", (size,), bias, when=when)


@dataclass(frozen=True, slots=True)
class Family:
    """One row per architecture: its modules in execution order.

    Attributes:
        architectures: Names in ``architectures`` of config.json.
        attention: Rows of the attention, norms included.
        mlp: Rows of a dense feed-forward part.
        moe: Rows of a mixture's feed-forward part beside its experts.
        expert: Rows of one expert; paths hold ``{expert}``.
        before: Rows before the blocks: the embeddings.
        after: Rows after the blocks, without the head.
        blocks: Path of the list of blocks.
        head: Path of the head.
        head_bias: Flag of the head's bias.
        tied: Default of ``tie_word_embeddings``.
        flags: Defaults of the flags that are keys of config.json.
        grouped: Whether ``num_key_value_heads`` means anything.
        keys: Name in this config of what is elsewhere called otherwise.
        required: Keys that have no default.
    """

    architectures: tuple[str, ...]
    attention: tuple[Row, ...]
    mlp: tuple[Row, ...] = ()
    moe: tuple[Row, ...] = ()
    expert: tuple[Row, ...] = ()
    before: tuple[Row, ...] = (Row("model.embed_tokens", "embedding", ("vocabulary", "hidden")),)
    after: tuple[Row, ...] = (norm("model.norm"),)
    blocks: str = "model.layers"
    head: str = "lm_head"
    head_bias: str = ""
    tied: bool = False
    flags: Mapping[str, bool] = field(default_factory=dict)
    grouped: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    required: tuple[str, ...] = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "intermediate_size",
    )


def _attention(
    qkv_bias: str = "", output_bias: str = "", output: str = "o_proj"
) -> tuple[Row, ...]:
    group = {"reads": "self_attn.qkv", "fused": "self_attn.qkv_proj"}
    return (
        linear("self_attn.q_proj", "hidden", "queries", qkv_bias, **group),
        linear("self_attn.k_proj", "hidden", "keys", qkv_bias, **group),
        linear("self_attn.v_proj", "hidden", "values", qkv_bias, **group),
        linear(f"self_attn.{output}", "queries", "hidden", output_bias),
    )


def gated(
    path: str = "mlp", size: str = "intermediate", bias: str = "", when: str = "yes"
) -> tuple[Row, ...]:
    """Return the rows of a gated feed-forward part (gate, up, down)."""
    group = {"reads": f"{path}.gate_up", "fused": f"{path}.gate_up_proj", "when": when}
    return (
        linear(f"{path}.gate_proj", "hidden", size, bias, **group),
        linear(f"{path}.up_proj", "hidden", size, bias, **group),
        linear(f"{path}.down_proj", size, "hidden", bias, when=when),
    )


def _experts(
    path: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Row, ...]:
    # Every expert of a block reads the same input, and engines stack all of a block's experts into
    # one kernel: they share one scheme, by projection pair.
    group = {"reads": f"{path}.gate_up", "fused": f"{path}.experts"}
    inside = f"{path}.experts.{{expert}}"
    return (
        linear(f"{inside}.{gate}", "hidden", "expert", **group),
        linear(f"{inside}.{up}", "hidden", "expert", **group),
        linear(f"{inside}.{down}", "expert", "hidden", fused=f"{path}.experts"),
    )


_LLAMA_NORMS = (norm("input_layernorm"), norm("post_attention_layernorm"))
_QK_NORMS = (norm("self_attn.q_norm", "head"), norm("self_attn.k_norm", "head"))
_GEMMA2_NORMS = (
    *_LLAMA_NORMS,
    norm("pre_feedforward_layernorm"),
    norm("post_feedforward_layernorm"),
)
_ROUTER = Row("mlp.gate", "router", ("hidden", "experts"))

_LATENT_ATTENTION = (
    linear("self_attn.q_proj", "hidden", "queries", when="!q_lora_rank", reads="self_attn.qkv"),
    linear("self_attn.q_a_proj", "hidden", "q_lora", "attention_bias", "self_attn.qkv",
           "self_attn.fused_qkv_a_proj", "q_lora_rank"),
    linear("self_attn.kv_a_proj_with_mqa", "hidden", "kv_lora+rope", "attention_bias",
           "self_attn.qkv", "self_attn.fused_qkv_a_proj"),
    norm("self_attn.q_a_layernorm", "q_lora", when="q_lora_rank"),
    linear("self_attn.q_b_proj", "q_lora", "queries", when="q_lora_rank"),
    norm("self_attn.kv_a_layernorm", "kv_lora"),
    linear("self_attn.kv_b_proj", "kv_lora", "latent_heads"),
    linear("self_attn.o_proj", "latent_values", "hidden", "attention_bias"),
)  # fmt: skip

_SHARED = gated("mlp.shared_experts", "shared", when="n_shared_experts")

FAMILIES: tuple[Family, ...] = (
    Family(
        ("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "YiForCausalLM",
         "DeciLMForCausalLM", "ArceeForCausalLM", "SmolLM3ForCausalLM"),
        attention=(*_attention("attention_bias", "attention_bias"), *_LLAMA_NORMS),
        mlp=gated(bias="mlp_bias"),
    ),
    Family(
        ("Qwen2ForCausalLM",),
        attention=(*_attention("yes"), *_LLAMA_NORMS),
        mlp=gated(),
    ),
    Family(
        ("Qwen3ForCausalLM",),
        attention=(*_attention("attention_bias", "attention_bias"), *_QK_NORMS, *_LLAMA_NORMS),
        mlp=gated(),
    ),
    Family(
        ("OlmoForCausalLM",),  # its layer norms have no parameters
        attention=_attention("attention_bias", "attention_bias"),
        mlp=gated(),
        after=(),
    ),
    Family(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        attention=(
            *_attention("attention_bias", "attention_bias"),
            norm("self_attn.q_norm", "queries"),
            norm("self_attn.k_norm", "keys"),
            norm("post_attention_layernorm"),
            norm("post_feedforward_layernorm"),
        ),
        mlp=gated(),
    ),
    Family(
        ("GemmaForCausalLM",),
        attention=(*_attention("attention_bias", "attention_bias"), *_LLAMA_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("Gemma2ForCausalLM",),
        attention=(*_attention("attention_bias", "attention_bias"), *_GEMMA2_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        attention=(*_attention("attention_bias", "attention_bias"), *_QK_NORMS, *_GEMMA2_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("CohereForCausalLM",),
        attention=(
            *_attention("attention_bias", "attention_bias"),
            norm("input_layernorm"),
            Row("self_attn.q_norm", "norm", ("heads", "head"), when="use_qk_norm"),
            Row("self_attn.k_norm", "norm", ("kv_heads", "head"), when="use_qk_norm"),
        ),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("StableLmForCausalLM",),
        attention=(
            *_attention("use_qkv_bias"),
            norm("input_layernorm", bias="yes"),
            norm("post_attention_layernorm", bias="yes", when="!use_parallel_residual"),
        ),
        mlp=gated(),
        after=(norm("model.norm", bias="yes"),),
    ),
    Family(
        ("Starcoder2ForCausalLM",),
        attention=(
            *_attention("use_bias", "use_bias"),
            norm("input_layernorm", bias="yes"),
            norm("post_attention_layernorm", bias="yes"),
        ),
        mlp=(
            linear("mlp.c_fc", "hidden", "intermediate", "use_bias"),
            linear("mlp.c_proj", "intermediate", "hidden", "use_bias"),
        ),
        after=(norm("model.norm", bias="yes"),),
        flags={"use_bias": True},
        tied=True,
    ),
    Family(
        ("Phi3ForCausalLM", "Phi4ForCausalLM"),
        attention=(
            linear("self_attn.qkv_proj", "hidden", "queries+keys+values"),
            linear("self_attn.o_proj", "queries", "hidden"),
            *_LLAMA_NORMS,
        ),
        mlp=(
            linear("mlp.gate_up_proj", "hidden", "intermediate+intermediate"),
            linear("mlp.down_proj", "intermediate", "hidden"),
        ),
    ),
    Family(
        ("PhiForCausalLM",),
        attention=(*_attention("yes", "yes", "dense"), norm("input_layernorm", bias="yes")),
        mlp=(
            # The block is parallel: attention and feed-forward read the same normalised input.
            linear("mlp.fc1", "hidden", "intermediate", "yes", reads="self_attn.qkv"),
            linear("mlp.fc2", "intermediate", "hidden", "yes"),
        ),
        after=(norm("model.final_layernorm", bias="yes"),),
        head_bias="yes",
    ),
    Family(
        ("OPTForCausalLM",),
        attention=(
            *_attention("enable_bias", "enable_bias", "out_proj"),
            norm("self_attn_layer_norm", bias="yes"),
            norm("final_layer_norm", bias="yes"),
        ),
        mlp=(
            linear("fc1", "hidden", "intermediate", "enable_bias"),
            linear("fc2", "intermediate", "hidden", "enable_bias"),
        ),
        before=(
            Row("model.decoder.embed_tokens", "embedding", ("vocabulary", "embedding")),
            Row("model.decoder.embed_positions", "parameter", ("positions+2", "hidden")),
            Row("model.decoder.project_in", "router", ("embedding", "hidden"), when="projected"),
        ),
        after=(
            Row("model.decoder.project_out", "router", ("hidden", "embedding"), when="projected"),
            norm("model.decoder.final_layer_norm", bias="yes", when="do_layer_norm_before"),
        ),
        blocks="model.decoder.layers",
        grouped=False,
        tied=True,
        flags={"enable_bias": True, "do_layer_norm_before": True},
        keys={"intermediate_size": "ffn_dim"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "ffn_dim", "max_position_embeddings"),
    ),
    Family(
        ("GPT2LMHeadModel",),
        attention=(
            norm("ln_1", bias="yes"),
            Row("attn.c_attn", "conv1d", ("hidden", "queries+keys+values"), "yes"),
            Row("attn.c_proj", "conv1d", ("hidden", "hidden"), "yes"),
            norm("ln_2", bias="yes"),
        ),
        mlp=(
            Row("mlp.c_fc", "conv1d", ("hidden", "intermediate"), "yes"),
            Row("mlp.c_proj", "conv1d", ("intermediate", "hidden"), "yes"),
        ),
        before=(
            Row("transformer.wte", "embedding", ("vocabulary", "hidden")),
            Row("transformer.wpe", "parameter", ("positions", "hidden")),
        ),
        after=(norm("transformer.ln_f", bias="yes"),),
        blocks="transformer.h",
        tied=True,
        grouped=False,
        keys={"hidden_size": "n_embd", "num_hidden_layers": "n_layer",
              "num_attention_heads": "n_head", "intermediate_size": "n_inner",
              "max_position_embeddings": "n_positions"},
        required=("n_embd", "n_layer", "n_head", "vocab_size", "n_positions"),
    ),
    Family(
        ("GPTNeoXForCausalLM",),
        attention=(
            norm("input_layernorm", bias="yes"),
            norm("post_attention_layernorm", bias="yes"),
            linear("attention.query_key_value", "hidden", "queries+keys+values", "attention_bias"),
            linear("attention.dense", "queries", "hidden", "attention_bias"),
        ),
        mlp=(
            linear("mlp.dense_h_to_4h", "hidden", "intermediate", "yes"),
            linear("mlp.dense_4h_to_h", "intermediate", "hidden", "yes"),
        ),
        before=(Row("gpt_neox.embed_in", "embedding", ("vocabulary", "hidden")),),
        after=(norm("gpt_neox.final_layer_norm", bias="yes"),),
        blocks="gpt_neox.layers",
        head="embed_out",
        grouped=False,
        flags={"attention_bias": True},
    ),
    Family(
        ("FalconForCausalLM",),
        attention=(
            norm("input_layernorm", bias="yes", when="!two_norms"),
            norm("ln_attn", bias="yes", when="two_norms"),
            norm("ln_mlp", bias="yes", when="two_norms"),
            norm("post_attention_layernorm", bias="yes", when="sequential"),
            linear("self_attention.query_key_value", "hidden", "queries+keys+values", "bias",
                   reads="self_attention.qkv"),
            linear("self_attention.dense", "queries", "hidden", "bias"),
        ),
        mlp=(
            linear("mlp.dense_h_to_4h", "hidden", "intermediate", "bias"),
            linear("mlp.dense_4h_to_h", "intermediate", "hidden", "bias"),
        ),
        before=(Row("transformer.word_embeddings", "embedding", ("vocabulary", "hidden")),),
        after=(norm("transformer.ln_f", bias="yes"),),
        blocks="transformer.h",
        tied=True,
        keys={"intermediate_size": "ffn_hidden_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    ),
    Family(
        ("MixtralForCausalLM",),
        attention=(*_attention(), *_LLAMA_NORMS),
        moe=(Row("block_sparse_moe.gate", "router", ("hidden", "experts")),),
        expert=_experts("block_sparse_moe", "w1", "w3", "w2"),
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        ("Qwen2MoeForCausalLM",),
        attention=(*_attention("qkv_bias"), *_LLAMA_NORMS),
        mlp=gated(),
        moe=(
            _ROUTER,
            *gated("mlp.shared_expert", "shared"),
            Row("mlp.shared_expert_gate", "router", ("hidden", "one")),
        ),
        expert=_experts("mlp"),
        flags={"qkv_bias": True},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts",
                  "num_experts_per_tok"),
    ),
    Family(
        ("Qwen3MoeForCausalLM",),
        attention=(*_attention("attention_bias", "attention_bias"), *_QK_NORMS, *_LLAMA_NORMS),
        mlp=gated(),
        moe=(_ROUTER,),
        expert=_experts("mlp"),
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    ),
    Family(
        ("OlmoeForCausalLM",),
        attention=(
            *_attention("attention_bias", "attention_bias"),
            norm("self_attn.q_norm", "queries"),
            norm("self_attn.k_norm", "keys"),
            *_LLAMA_NORMS,
        ),
        moe=(_ROUTER,),
        expert=_experts("mlp"),
        keys={"moe_intermediate_size": "intermediate_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "num_experts", "num_experts_per_tok"),
    ),
    Family(
        ("GptOssForCausalLM",),
        attention=(
            *_attention("attention_bias", "attention_bias"),
            Row("self_attn.sinks", "parameter", ("heads",)),
            *_LLAMA_NORMS,
        ),
        moe=(
            Row("mlp.router", "router", ("hidden", "experts"), "yes"),
            Row("mlp.experts.gate_up_proj", "stacked", ("hidden", "expert+expert"), "yes"),
            Row("mlp.experts.down_proj", "stacked", ("expert", "hidden"), "yes"),
        ),
        flags={"attention_bias": True},
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "num_local_experts", "head_dim", "num_experts_per_tok"),
    ),
    Family(
        ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
        attention=(*_LATENT_ATTENTION, *_LLAMA_NORMS),
        mlp=gated(),
        moe=(
            _ROUTER,
            Row("mlp.gate.e_score_correction_bias", "parameter", ("experts",), when="corrected"),
            *_SHARED,
        ),
        expert=_experts("mlp"),
        keys={"num_experts": "n_routed_experts"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "moe_intermediate_size", "n_routed_experts",
                  "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                  "v_head_dim"),
    ),
)  # fmt: skip
"""Every architecture whose tensors are known, in the order of the message that names them."""

BY_ARCHITECTURE: dict[str, Family] = {
    name: family for family in FAMILIES for name in family.architectures
}
