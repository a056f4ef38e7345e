"""The rewriting of examples/smollm2.py changes the weights and not the function."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    specification = importlib.util.spec_from_file_location("smollm2", EXAMPLES / "smollm2.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,  # 6 x 16 is not the hidden size, on purpose
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


@torch.no_grad()
def test_rewriting_keeps_the_function_and_moves_every_linear(
    script: ModuleType, model: LlamaForCausalLM
) -> None:
    tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
    before = model(tokens).logits
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    script.reparameterise(model, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    for name, weight in model.state_dict().items():
        ratio = weight / weights[name]
        if name.endswith("_proj.weight"):
            # Off the grid: within a row, each column moved by a factor of its own.
            assert ratio[0].unique().numel() > ratio.shape[1] / 4, name
            assert ratio.min() > 2**-0.76, name
            assert ratio.max() < 2**0.76, name
    assert torch.equal(model.model.embed_tokens.weight, weights["model.embed_tokens.weight"])


@torch.no_grad()
def test_the_seed_decides_the_scales(script: ModuleType, model: LlamaForCausalLM) -> None:
    results = []
    for seed in (0, 0, 1):
        copy = script.fresh_copy(model)
        script.reparameterise(copy, torch.Generator().manual_seed(seed))
        results.append(copy.model.layers[1].mlp.down_proj.weight)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@torch.no_grad()
def test_a_fresh_copy_forgets_the_gguf_and_can_be_saved(
    script: ModuleType, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model.config.rms_norm_eps = 9.999999747378752e-06
    model.config.quantization_config = {"quant_method": "gguf"}
    copy = script.fresh_copy(model)
    copy.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert loaded.config.rms_norm_eps == 1e-5
    tokens = torch.arange(10)[None]
    torch.testing.assert_close(loaded(tokens).logits, copy(tokens).logits)
