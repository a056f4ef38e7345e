"""Finding linears, folding scales, reading checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch

from advisor.errors import InputError
from advisor.models.checkpoint import iterate_tensors, read_tensor, tensor_names
from advisor.models.folding import fold_scales, foldable_groups
from advisor.models.inspect import find_linears
from advisor.models.load import load_model


def test_linears_in_execution_order(random_llama):
    names = [linear.name.removeprefix("model.layers.0.") for linear in random_llama.linears[:7]]
    assert names == [
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    key = random_llama.linears[1]
    assert (key.in_features, key.out_features, key.block) == (64, 32, 0)
    assert key.input_group == random_llama.linears[2].input_group == "model.layers.0.self_attn.qkv"
    assert key.fused_group == "model.layers.0.self_attn.qkv_proj"
    down = random_llama.linears[13]
    assert (down.name, down.in_features, down.block) == ("model.layers.1.mlp.down_proj", 128, 1)
    assert down.fused_group == down.input_group == down.name
    up = random_llama.linears[12]
    assert (up.input_group, up.fused_group) == (
        "model.layers.1.mlp.gate_up", "model.layers.1.mlp.gate_up_proj",
    )  # fmt: skip


def test_unknown_architecture_names_the_known_ones():
    with pytest.raises(InputError, match=r"'Linear' is not known.*LlamaForCausalLM"):
        find_linears(torch.nn.Linear(2, 2))


def tiny(name: str):
    """A tiny random model of another architecture."""
    import transformers

    config = getattr(transformers, f"{name}Config".replace("Gemma3Config", "Gemma3TextConfig"))(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


ARCHITECTURES = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "Phi3"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_keeps_the_function_of_every_architecture(name):
    model = tiny(name)
    tokens = torch.arange(3, 23)[None]
    before = model(tokens).logits
    tensors = dict(model.state_dict())
    original = copy.deepcopy(tensors)
    foldings = foldable_groups(model)
    assert len(foldings) == 2 * 3  # grouped queries: not into v_proj
    generator = torch.Generator().manual_seed(1)
    for folding in foldings:
        size = tensors[f"{folding.linears[0]}.weight"].shape[1]
        scales = torch.rand(size, generator=generator) + 0.5
        tensors.update(fold_scales(tensors, folding, scales))
    assert all(torch.equal(original[name], value) for name, value in model.state_dict().items())
    model.load_state_dict(tensors)
    after = model(tokens).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_one_by_one_are_the_model(name):
    from advisor.models.blocks import BlockRunner

    BlockRunner(tiny(name)).check(torch.arange(3, 23)[None])


def test_full_heads_fold_into_values_with_their_bias(llama_builder):
    loaded = load_model(llama_builder(num_key_value_heads=4, attention_bias=True))
    assert not loaded.model.model.layers[0].self_attn.v_proj.bias.isnan().any()
    loaded.model.model.layers[0].self_attn.v_proj.bias.normal_()
    (folding,) = [
        folding for folding in foldable_groups(loaded.model)
        if folding.input_group == "model.layers.0.self_attn.o_proj"
    ]  # fmt: skip
    assert (folding.producer, folding.producer_kind) == (
        "model.layers.0.self_attn.v_proj", "linear",
    )  # fmt: skip
    tokens = torch.arange(20)[None]
    before = loaded.model(tokens).logits
    tensors = fold_scales(dict(loaded.model.state_dict()), folding, torch.linspace(0.5, 2, 64))
    assert "model.layers.0.self_attn.v_proj.bias" in tensors
    loaded.model.load_state_dict(tensors, strict=False)
    torch.testing.assert_close(loaded.model(tokens).logits, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_folding_refuses_impossible_scales(random_llama, value):
    folding = foldable_groups(random_llama.model)[0]
    scales = torch.ones(64)
    scales[5] = value
    with pytest.raises(InputError, match="positive and finite"):
        fold_scales(random_llama.model.state_dict(), folding, scales)


def test_sharded_and_single_checkpoints_read_alike(random_llama, tmp_path):
    random_llama.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    single = dict(iterate_tensors(random_llama.folder))
    sharded = dict(iterate_tensors(tmp_path))
    assert sorted(single) == sorted(sharded) == sorted(tensor_names(tmp_path))
    assert all(torch.equal(single[name], sharded[name]) for name in single)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(read_tensor(tmp_path, name), single[name])
    assert "lm_head.weight" not in single  # tied
    with pytest.raises(InputError, match=r"no tensor named 'lm_head\.weight'"):
        read_tensor(tmp_path, "lm_head.weight")


def test_loaded_model_is_ready(random_llama):
    assert random_llama.dtype == torch.float32
    assert not random_llama.model.training
    assert not any(parameter.requires_grad for parameter in random_llama.model.parameters())
    assert random_llama.tokenizer("fox")["input_ids"]
    assert len(random_llama.fingerprint) == 64
