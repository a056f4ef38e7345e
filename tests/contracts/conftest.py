"""A tiny random instance of every architecture that can be quantized, as its users have it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

_LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
_MIXTURE = _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Case:
    """One tiny model: its class in transformers, its settings, and what is special about it."""

    architecture: str
    settings: dict = field(default_factory=lambda: dict(_LLAMA))
    config_class: str = ""

    def config(self, vocab_size: int):
        """Return its configuration."""
        import transformers

        stem = self.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        position = "n_positions" if stem == "GPT2" else "max_position_embeddings"
        return getattr(transformers, self.config_class or f"{stem}Config")(
            **common, **{position: 128}, **self.settings
        )


_OPT = {
    "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 64,
}  # fmt: skip
_FALCON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
_PLAIN = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"}
_GEMMA = _LLAMA | {"head_dim": 16}

CASES = {
    "llama": Case("LlamaForCausalLM", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-full-heads": Case("LlamaForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "llama-odd": Case(
        "LlamaForCausalLM",
        _LLAMA | {"hidden_size": 60, "intermediate_size": 100, "head_dim": 12},
    ),
    "mistral": Case("MistralForCausalLM"),
    "granite": Case("GraniteForCausalLM", _LLAMA | {"logits_scaling": 4.0,
                    "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "smollm3": Case("SmolLM3ForCausalLM"),
    "qwen2": Case("Qwen2ForCausalLM", _LLAMA | {"tie_word_embeddings": True}),
    "qwen3": Case("Qwen3ForCausalLM", _LLAMA | {"head_dim": 16}),
    "gemma": Case("GemmaForCausalLM", _GEMMA),
    "gemma2": Case("Gemma2ForCausalLM", _GEMMA),
    "gemma3": Case("Gemma3ForCausalLM", _GEMMA, "Gemma3TextConfig"),
    "phi3": Case("Phi3ForCausalLM"),
    "phi4": Case("Phi3ForCausalLM", _LLAMA | {"num_key_value_heads": 4,
                 "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    "arcee": Case("ArceeForCausalLM"),
    "olmo": Case("OlmoForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "olmo2": Case("Olmo2ForCausalLM"),
    "olmo3": Case("Olmo3ForCausalLM"),
    "cohere": Case("CohereForCausalLM"),
    "stablelm": Case("StableLmForCausalLM", _LLAMA | {"use_qkv_bias": True}),
    "stablelm-parallel": Case("StableLmForCausalLM", _LLAMA | {"use_parallel_residual": True}),
    "starcoder2": Case("Starcoder2ForCausalLM", _LLAMA | {"num_key_value_heads": 4}),
    "phi2": Case("PhiForCausalLM", _PLAIN),
    "opt": Case("OPTForCausalLM", _OPT),
    "opt-350m": Case("OPTForCausalLM", _OPT | {"do_layer_norm_before": False,
                     "word_embed_proj_dim": 32}),
    "gpt2": Case("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "pythia": Case("GPTNeoXForCausalLM", _PLAIN | {"use_parallel_residual": True}),
    "gpt-neox-serial": Case("GPTNeoXForCausalLM", _PLAIN | {"use_parallel_residual": False}),
    "falcon-7b": Case("FalconForCausalLM", _FALCON),
    "falcon-40b": Case("FalconForCausalLM", _FALCON | {"new_decoder_architecture": True,
                       "num_kv_heads": 2}),
    "falcon-rw": Case("FalconForCausalLM", _FALCON | {"multi_query": False, "alibi": True,
                      "parallel_attn": False, "bias": True}),
    "mixtral": Case("MixtralForCausalLM", _LLAMA | {"num_local_experts": 4}),
    "qwen2-moe": Case("Qwen2MoeForCausalLM", _MIXTURE | {"mlp_only_layers": [0],
                      "shared_expert_intermediate_size": 64}),
    "qwen3-moe": Case("Qwen3MoeForCausalLM", _MIXTURE | {"head_dim": 16}),
    "olmoe": Case("OlmoeForCausalLM", _LLAMA | {"num_experts": 4, "num_experts_per_tok": 2,
                  "intermediate_size": 32}),
}  # fmt: skip


def build(case: Case, vocab_size: int):
    """Return a random model whose outputs depend on every tensor."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, case.architecture)(case.config(vocab_size))
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name or ".ln_" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        elif "experts" in name or parameter.ndim == 2:
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn_like(parameter) * (1.5 / fan_in**0.5))
        else:
            parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, random_llama_folder):
    """Build a case by name, once: (folder, the model as transformers has it)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_llama_folder)
    built: dict[str, tuple[Path, object]] = {}

    def get(name: str):
        if name not in built:
            folder = tmp_path_factory.mktemp("tiny") / name
            model = build(CASES[name], len(tokenizer))
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            built[name] = folder, model
        return built[name]

    return get


@pytest.fixture(scope="session")
def cases():
    """The cases by name."""
    return CASES


def pytest_generate_tests(metafunc):
    """Run a test with the argument ``case`` on every architecture."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(CASES))
