"""Tensors from configurations, judged by transformers' own modules and by published totals."""

from __future__ import annotations

import json

import pytest

from advisor.errors import InputError
from advisor.modelspec import build_modelspec
from advisor.predict.models import list_models, load_modelspec

BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "intermediate_size": 96,
}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip
CASES = [
    ("LlamaForCausalLM", "LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    ("MistralForCausalLM", "MistralConfig", {}),
    ("Qwen2ForCausalLM", "Qwen2Config", {}),
    ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 24}),
    ("OlmoForCausalLM", "OlmoConfig", {"eos_token_id": 1, "pad_token_id": 1}),
    ("Olmo2ForCausalLM", "Olmo2Config", {"eos_token_id": 1, "pad_token_id": 1}),
    ("GemmaForCausalLM", "GemmaConfig", {"head_dim": 32}),
    ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 32}),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", {"head_dim": 32}),
    ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0}),
    ("PhiForCausalLM", "PhiConfig", {}),
    ("StableLmForCausalLM", "StableLmConfig", {"use_qkv_bias": True}),
    ("Starcoder2ForCausalLM", "Starcoder2Config", {}),
    ("CohereForCausalLM", "CohereConfig", {"use_qk_norm": True}),
    ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 32,
                                     "do_layer_norm_before": False}),
    ("OPTForCausalLM", "OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", {}),
    ("FalconForCausalLM", "FalconConfig", {}),
    ("FalconForCausalLM", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("FalconForCausalLM", "FalconConfig", {"parallel_attn": False, "bias": True,
                                           "multi_query": False}),
    ("MixtralForCausalLM", "MixtralConfig", {"num_local_experts": 4}),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32,
                                               "shared_expert_intermediate_size": 48,
                                               "mlp_only_layers": [1]}),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 32,
                                               "head_dim": 24, "decoder_sparse_step": 2}),
    ("GptOssForCausalLM", "GptOssConfig", {"num_local_experts": 4, "head_dim": 16}),
    ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT | {"q_lora_rank": None,
                                                           "n_shared_experts": 2}),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT | {"q_lora_rank": 24,
                                                           "n_shared_experts": 1,
                                                           "n_group": 1, "topk_group": 1,
                                                           "topk_method": "noaux_tc"}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config_class", "extra"), CASES)
def test_tensors_are_those_of_transformers(architecture, config_class, extra):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, config_class)(**(BASE | extra))
    with torch.device("meta"):
        model = getattr(transformers, architecture)(config)
    data = json.loads(config.to_json_string(use_diff=False))
    for key, value in extra.items():
        data.setdefault(key, value)
    data["architectures"] = [architecture]
    spec = build_modelspec(data, model_id="test")

    stored = {name: tuple(value.shape) for name, value in model.named_parameters()}
    if config.tie_word_embeddings:
        stored.pop("lm_head.weight", None)
    corrections = sum(
        value.numel() for name, value in model.named_buffers() if "correction" in name
    )
    ours = {tensor.name: tensor.shape for tensor in spec.tensors}
    assert spec.tied_embeddings == config.tie_word_embeddings
    wrong = {name for name, shape in stored.items() if ours.get(name, shape) != shape}
    assert not wrong
    sizes = [torch.Size(shape).numel() for shape in stored.values()]
    assert spec.parameters == sum(sizes) + corrections
    # transformers stacks experts in memory and renames a few; files keep one matrix per expert.
    renamed = {"lm_head.weight", "embed_out.weight"}
    assert not {
        name for name in stored.keys() - ours.keys() - renamed if ".mlp.experts" not in name
    } - {name for name in stored if architecture.startswith("Mixtral") and ".mlp." in name}


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("google/gemma-3-4b-it", 4_300_079_472),  # with its vision tower
        ("deepseek-ai/DeepSeek-V3", 671_026_419_200),
        ("openai/gpt-oss-20b", 20_914_757_184),
        ("openai/gpt-oss-120b", 116_829_156_672),
        ("mistralai/Mistral-Nemo-Base-2407", 12_247_782_400),
        ("HuggingFaceTB/SmolLM3-3B", 3_075_098_624),
        ("moonshotai/Kimi-K2-Instruct", 1_026_408_232_448),
        ("facebook/opt-350m", 331_196_416),
        ("EleutherAI/pythia-70m", 70_426_624),
        ("tiiuae/falcon-40b", 41_303_293_952),
        ("mistralai/Mixtral-8x7B-v0.1", 46_702_792_704),
        ("microsoft/Phi-4-mini-instruct", 3_836_021_760),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
    ],
)
def test_parameters_of_published_models(model, parameters):
    assert load_modelspec(model).parameters == parameters


def test_active_parameters_count_the_routed_experts_only():
    # 37 billion of 671 are published for DeepSeek-V3, 3.3 of 30.5 for Qwen3-30B-A3B.
    assert load_modelspec("deepseek-ai/DeepSeek-V3").active_parameters / 1e9 == pytest.approx(
        37.6, abs=0.1
    )
    assert load_modelspec("Qwen/Qwen3-30B-A3B").active_parameters / 1e9 == pytest.approx(
        3.35, abs=0.05
    )


def test_the_catalogue_builds_and_no_linear_is_counted_twice():
    for model in list_models():
        spec = load_modelspec(model)
        names = {linear.name for linear in spec.linears}
        assert len(names) == len(spec.linears), model
        assert sum(linear.parameters for linear in spec.linears) == spec.quantizable_parameters
        assert len(spec.attention) == spec.blocks


def test_groups_of_a_llama_block():
    spec = build_modelspec({"architectures": ["LlamaForCausalLM"], **BASE}, model_id="test")
    block = {linear.name.rpartition(".")[2]: linear for linear in spec.linears if linear.block == 1}
    assert list(block) == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert block["k_proj"].input_group == "model.layers.1.self_attn.qkv"
    assert block["k_proj"].fused_group == "model.layers.1.self_attn.qkv_proj"
    assert block["up_proj"].fused_group == "model.layers.1.mlp.gate_up_proj"
    assert block["o_proj"].fused_group == block["o_proj"].name
    assert (block["k_proj"].in_features, block["k_proj"].out_features) == (64, 32)


def test_sliding_windows_follow_each_family():
    def windows(model):
        return [layer.window for layer in load_modelspec(model).attention]

    gemma2, gemma3 = windows("google/gemma-2-2b"), windows("google/gemma-3-1b-it")
    assert gemma2[:2] == [4096, None]
    assert gemma3[:6] == [512] * 5 + [None]
    assert set(windows("mistralai/Mistral-7B-v0.1")) == {4096}
    assert set(windows("Qwen/Qwen2.5-7B")) == {None}


def test_blocks_that_an_architecture_search_changed():
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 8.0}},
        ],
    }  # fmt: skip
    spec = build_modelspec(config, model_id="test")
    shapes = {linear.name: linear.out_features for linear in spec.linears}
    assert shapes["model.layers.0.self_attn.k_proj"] == 32
    assert "model.layers.1.self_attn.k_proj" not in shapes
    assert shapes["model.layers.0.mlp.up_proj"] == 256  # 85 rounded up
    assert shapes["model.layers.1.mlp.up_proj"] == 512  # 341 rounded up
    assert len(spec.attention) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["names no architecture"]),
        ({"architectures": ["LlamaForCausalML"]}, ["unknown architecture", "'LlamaForCausalLM'"]),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
         ["num_hidden_layers, num_attention_heads, vocab_size, intermediate_size"]),
        ({"architectures": ["LlamaForCausalLM"], **BASE, "hidden_size": "64", "vocab_size": -1},
         ["hidden_size='64'", "vocab_size=-1"]),
        ({"architectures": ["LlamaForCausalLM"], **BASE, "num_key_value_heads": 3}, ["3 and 4"]),
    ],
)  # fmt: skip
def test_bad_configurations_name_every_offender(config, words):
    with pytest.raises(InputError) as caught:
        build_modelspec(config, model_id="test")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 2048),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 4096),
        # Llama 3.1's and Phi's scaling is in max_position_embeddings already.
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 2048),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 32.0}}, 2048),
        # YaRN scales what the model had before; DeepSeek names that, Qwen2.5 leaves it there.
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 8192),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0,
                           "original_max_position_embeddings": 512}}, 2048),
        ({"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
         2048),
    ],
)  # fmt: skip
def test_scaled_positions_reach_further(changes, longest):
    config = {"architectures": ["LlamaForCausalLM"], **BASE, "max_position_embeddings": 2048}
    assert build_modelspec(config | changes, model_id="test").longest_context == longest
