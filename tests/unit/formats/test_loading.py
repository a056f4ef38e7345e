"""Real loaders, in this environment: transformers with compressed-tensors and bitsandbytes."""

from __future__ import annotations

import pytest
import torch

from advisor.formats.export import write_checkpoint

TOKENS = torch.arange(2, 42).reshape(2, 20)


def mixed(module: str) -> str | None:
    """int4 of two group sizes, int8 with int8 activations, and 16-bit, by fused group."""
    if "layers.0.self_attn" in module:
        return "rtn-int8-gch-sym-aint8"
    if "layers.0.mlp.down_proj" in module:
        return None
    return "rtn-int4-g32-asym" if "self_attn" in module else "rtn-int4-g16-sym"


def logits_of(folder, dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model, model(TOKENS).logits


def our_logits(source, weights, dtype):
    """Logits with our dequantized weights in place, 16-bit activations."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight.dequantize(dtype))
        return model(TOKENS).logits


@pytest.mark.parametrize(
    "scheme",
    [
        "rtn-int4-g32-sym", "rtn-int4-g32-asym", "rtn-int4-gch-sym", "rtn-int3-g32-sym",
        "rtn-int5-g16-asym", "rtn-int8-g32-sym", "rtn-fp8-gch",
    ],
)  # fmt: skip
def test_transformers_runs_weight_only_compressed_tensors_as_we_do(
    bf16_folder, quantized, tmp_path, scheme
):
    weights = quantized(scheme)
    write_checkpoint(bf16_folder, tmp_path / "out", format="compressed-tensors", weights=weights)
    model, found = logits_of(tmp_path / "out", torch.bfloat16)
    expected = our_logits(bf16_folder, weights, torch.bfloat16)
    assert model.config.quantization_config.quant_method == "compressed-tensors"
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "scheme",
    ["rtn-fp8-gch-afp8-static", "rtn-fp8-gtensor-afp8-static", "rtn-int8-gch-sym-aint8-static"],
)
def test_transformers_rounds_inputs_as_the_checkpoint_says(
    bf16_folder, quantized, tmp_path, scheme
):
    from transformers import AutoModelForCausalLM

    from advisor.evaluation.runtime import quantized_model

    weights = quantized(scheme)
    write_checkpoint(bf16_folder, tmp_path / "out", format="compressed-tensors", weights=weights)
    loaded, found = logits_of(tmp_path / "out", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(bf16_folder, dtype=torch.float32).eval()
    with torch.no_grad(), quantized_model(model, weights):
        expected = model(TOKENS).logits
    plain = our_logits(bf16_folder, weights, torch.float32)
    # A tie that falls differently moves a code by one; without rounding they are much further.
    assert (found - expected).abs().mean() < 0.2 * (plain - expected).abs().mean()
    for name, weight in weights.items():
        scale = loaded.get_submodule(name).input_scale
        assert float(scale) == float(weight.extras["input_scale"])


def test_transformers_runs_a_mixture_of_compressed_tensors_groups(bf16_folder, quantized, tmp_path):
    from transformers import AutoModelForCausalLM

    from advisor.evaluation.runtime import quantized_model

    weights = quantized(mixed)
    write_checkpoint(bf16_folder, tmp_path / "out", format="compressed-tensors", weights=weights)
    _, found = logits_of(tmp_path / "out", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(bf16_folder, dtype=torch.bfloat16).eval()
    with torch.no_grad(), quantized_model(model, weights):
        expected = model(TOKENS).logits
    # Activations are rounded to int8 by both; a tie that falls differently moves a code by one.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    modules = {str(weight.scheme) for weight in weights.values()}
    assert modules == {"rtn-int8-gch-sym-aint8", "rtn-int4-g32-asym", "rtn-int4-g16-sym"}


@pytest.mark.parametrize(
    "scheme", ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq", "bnb-nf4-g32-dq", "bnb-fp4-g32"]
)
def test_transformers_reads_4_bit_bitsandbytes_weights_as_we_do(
    bf16_folder, quantized, tmp_path, scheme
):
    import bitsandbytes

    weights = quantized(scheme)
    write_checkpoint(bf16_folder, tmp_path / "out", format="bitsandbytes", weights=weights)
    model, found = logits_of(tmp_path / "out", torch.float32)
    # Read again: a forward on the CPU may repack what the model holds.
    from transformers import AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in weights.items():
        module = fresh.get_submodule(name)
        assert isinstance(module, bitsandbytes.nn.Linear4bit)
        theirs = bitsandbytes.functional.dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        assert torch.equal(theirs.float(), weight.dequantize(theirs.dtype).float())
    expected = our_logits(bf16_folder, weights, torch.float32)
    assert not isinstance(model.lm_head, bitsandbytes.nn.Linear4bit)
    # Their product runs in bnb_4bit_compute_dtype, bfloat16.
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_transformers_reads_llm_int8_weights_as_we_do(bf16_folder, quantized, tmp_path):
    import bitsandbytes
    from transformers import AutoModelForCausalLM

    weights = quantized("llm.int8")
    write_checkpoint(bf16_folder, tmp_path / "out", format="bitsandbytes", weights=weights)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert isinstance(module, bitsandbytes.nn.Linear8bitLt)
        assert torch.equal(module.weight.data.to(torch.int16) + 128, weight.codes.to(torch.int16))
        assert torch.equal(module.weight.SCB, weight.extras["SCB"])
    with torch.no_grad():
        found = model(TOKENS).logits
    expected = our_logits(bf16_folder, weights, torch.bfloat16)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
