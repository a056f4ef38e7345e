"""The table of architectures: dense models here, mixtures of experts beside."""

from __future__ import annotations

from dataclasses import replace

from advisor.modelspec.mixtures import MIXTURES
from advisor.modelspec.rows import (
    LLAMA_NORMS,
    QK_NORMS,
    Family,
    Row,
    attention,
    gated,
    linear,
    norm,
)

_GEMMA2_NORMS = (
    *LLAMA_NORMS,
    norm("pre_feedforward_layernorm"),
    norm("post_feedforward_layernorm"),
)

_DENSE: tuple[Family, ...] = (
    Family(
        ("LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "YiForCausalLM",
         "SmolLM3ForCausalLM"),
        attention=(*attention("attention_bias", "attention_bias"), *LLAMA_NORMS),
        mlp=gated(bias="mlp_bias"),
    ),
    Family(
        ("ArceeForCausalLM",),  # a squared ReLU instead of a gate
        attention=(*attention("attention_bias", "attention_bias"), *LLAMA_NORMS),
        mlp=(
            linear("mlp.up_proj", "hidden", "intermediate", "mlp_bias"),
            linear("mlp.down_proj", "intermediate", "hidden", "mlp_bias"),
        ),
    ),
    Family(
        ("DeciLMForCausalLM",),
        attention=tuple(
            replace(row, when="has_attention")
            for row in (*attention("attention_bias", "attention_bias"), norm("input_layernorm"))
        ),
        mlp=(*gated(when="has_mlp"), norm("post_attention_layernorm", when="has_mlp")),
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                  "block_configs"),
    ),
    Family(
        ("Qwen2ForCausalLM",),
        attention=(*attention("yes"), *LLAMA_NORMS),
        mlp=gated(),
    ),
    Family(
        ("Qwen3ForCausalLM",),
        attention=(*attention("attention_bias", "attention_bias"), *QK_NORMS, *LLAMA_NORMS),
        mlp=gated(),
    ),
    Family(
        ("OlmoForCausalLM",),  # its layer norms have no parameters
        attention=attention("attention_bias", "attention_bias"),
        mlp=gated(),
        after=(),
    ),
    Family(
        ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        attention=(
            *attention("attention_bias", "attention_bias"),
            norm("self_attn.q_norm", "queries"),
            norm("self_attn.k_norm", "keys"),
            norm("post_attention_layernorm"),
            norm("post_feedforward_layernorm"),
        ),
        mlp=gated(),
    ),
    Family(
        ("GemmaForCausalLM",),
        attention=(*attention("attention_bias", "attention_bias"), *LLAMA_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("Gemma2ForCausalLM",),
        attention=(*attention("attention_bias", "attention_bias"), *_GEMMA2_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        attention=(*attention("attention_bias", "attention_bias"), *QK_NORMS, *_GEMMA2_NORMS),
        mlp=gated(),
        tied=True,
    ),
    Family(
        ("CohereForCausalLM",),
        attention=(
            *attention("attention_bias", "attention_bias"),
            norm("input_layernorm"),
            Row("self_attn.q_norm", "norm", ("heads", "head"), when="use_qk_norm"),
            Row("self_attn.k_norm", "norm", ("kv_heads", "head"), when="use_qk_norm"),
        ),
        mlp=gated(reads="self_attn.qkv"),  # the block is parallel
        tied=True,
    ),
    Family(
        ("StableLmForCausalLM",),
        attention=(
            *attention("use_qkv_bias"),
            norm("input_layernorm", bias="yes"),
            norm("post_attention_layernorm", bias="yes", when="!use_parallel_residual"),
        ),
        mlp=(
            *gated(when="!use_parallel_residual")[:2],
            *gated(when="use_parallel_residual", reads="self_attn.qkv")[:2],
            gated()[2],
        ),
        after=(norm("model.norm", bias="yes"),),
    ),
    Family(
        ("Starcoder2ForCausalLM",),
        attention=(
            *attention("use_bias", "use_bias"),
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
            *LLAMA_NORMS,
        ),
        mlp=(
            linear("mlp.gate_up_proj", "hidden", "intermediate+intermediate"),
            linear("mlp.down_proj", "intermediate", "hidden"),
        ),
    ),
    Family(
        ("PhiForCausalLM",),
        attention=(*attention("yes", "yes", "dense"), norm("input_layernorm", bias="yes")),
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
            *attention("enable_bias", "enable_bias", "out_proj"),
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
            linear("mlp.dense_h_to_4h", "hidden", "intermediate", "bias", when="!one_norm"),
            linear("mlp.dense_h_to_4h", "hidden", "intermediate", "bias",
                   reads="self_attention.qkv", when="one_norm"),
            linear("mlp.dense_4h_to_h", "intermediate", "hidden", "bias"),
        ),
        before=(Row("transformer.word_embeddings", "embedding", ("vocabulary", "hidden")),),
        after=(norm("transformer.ln_f", bias="yes"),),
        blocks="transformer.h",
        tied=True,
        keys={"intermediate_size": "ffn_hidden_size"},
        required=("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    ),
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (*_DENSE, *MIXTURES)
"""Every architecture whose tensors are known."""

BY_ARCHITECTURE: dict[str, Family] = {
    name: family for family in FAMILIES for name in family.architectures
}
