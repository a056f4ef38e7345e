"""Mixtures of experts and multi-head latent attention, as rows of the table of architectures."""

from __future__ import annotations

from advisor.modelspec.rows import (
    LLAMA_NORMS,
    QK_NORMS,
    Family,
    Row,
    attention,
    experts,
    gated,
    linear,
    norm,
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

MIXTURES: tuple[Family, ...] = (
    Family(
        ("MixtralForCausalLM",),
        attention=(*attention(), *LLAMA_NORMS),
        moe=(Row("block_sparse_moe.gate", "router", ("hidden", "experts")),),
        expert=experts("block_sparse_moe", "w1", "w3", "w2"),
        keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        ("Qwen2MoeForCausalLM",),
        attention=(*attention("qkv_bias"), *LLAMA_NORMS),
        mlp=gated(),
        moe=(
            _ROUTER,
            *gated("mlp.shared_expert", "shared"),
            Row("mlp.shared_expert_gate", "router", ("hidden", "one")),
        ),
        expert=experts("mlp"),
        flags={"qkv_bias": True},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "moe_intermediate_size", "shared_expert_intermediate_size", "num_experts",
                  "num_experts_per_tok"),
    ),
    Family(
        ("Qwen3MoeForCausalLM",),
        attention=(*attention("attention_bias", "attention_bias"), *QK_NORMS, *LLAMA_NORMS),
        mlp=gated(),
        moe=(_ROUTER,),
        expert=experts("mlp"),
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    ),
    Family(
        ("OlmoeForCausalLM",),
        attention=(
            *attention("attention_bias", "attention_bias"),
            norm("self_attn.q_norm", "queries"),
            norm("self_attn.k_norm", "keys"),
            *LLAMA_NORMS,
        ),
        moe=(_ROUTER,),
        expert=experts("mlp"),
        keys={"moe_intermediate_size": "intermediate_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "num_experts", "num_experts_per_tok"),
    ),
    Family(
        ("GptOssForCausalLM",),
        attention=(
            *attention("attention_bias", "attention_bias"),
            Row("self_attn.sinks", "parameter", ("heads",)),
            *LLAMA_NORMS,
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
        attention=(*_LATENT_ATTENTION, *LLAMA_NORMS),
        mlp=gated(),
        moe=(
            _ROUTER,
            Row("mlp.gate.e_score_correction_bias", "parameter", ("experts",), when="corrected"),
            *_SHARED,
        ),
        expert=experts("mlp"),
        keys={"num_experts": "n_routed_experts"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "intermediate_size", "moe_intermediate_size", "n_routed_experts",
                  "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim",
                  "v_head_dim"),
    ),
)  # fmt: skip
