"""Checkpoints that compressed-tensors itself wrote, inputs with calibrated scales among them."""

from __future__ import annotations

import pytest
import torch

from advisor import workflows
from advisor.evaluation.runtime import activation_simulation
from advisor.formats.read import read_checkpoint
from advisor.models.checkpoint import read_tensor

INPUTS = {
    "fp8 static": ("float", "tensor", "tensor", True, False),
    "int8 static": ("int", "channel", "tensor", True, False),
    "int8 static asymmetric": ("int", "channel", "tensor", False, False),
    "int8 dynamic asymmetric": ("int", "channel", "token", False, True),
}
"""Type, strategy of the weights and of the inputs, symmetric inputs, found at run time."""
QUERY = "model.layers.0.self_attn.q_proj"
SCALE, ZERO = 0.02, 5


@pytest.fixture
def written(bf16_folder, tmp_path):
    """Write a checkpoint with the library, and return its folder and the library's linear."""

    def build(kind):
        from compressed_tensors.compressors import ModelCompressor
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            apply_quantization_config,
        )
        from transformers import AutoModelForCausalLM

        numbers, weights, inputs, symmetric, dynamic = INPUTS[kind]
        scheme = QuantizationScheme(
            targets=["Linear"],
            weights=QuantizationArgs(num_bits=8, type=numbers, strategy=weights),
            input_activations=QuantizationArgs(
                num_bits=8, type=numbers, strategy=inputs, symmetric=symmetric, dynamic=dynamic
            ),
        )
        model = AutoModelForCausalLM.from_pretrained(bf16_folder, dtype=torch.bfloat16)
        config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
        apply_quantization_config(model, config)
        for module in model.modules():
            if not hasattr(module, "weight_scale"):
                continue
            largest = module.weight.detach().float().abs()
            top = largest.amax(1, keepdim=True) if weights == "channel" else largest.max()
            limit = 448.0 if numbers == "float" else 127.0
            module.weight_scale.data.copy_((top / limit).reshape(module.weight_scale.shape))
            if not dynamic:
                module.input_scale.data.fill_(SCALE)
                if not symmetric:
                    module.input_zero_point.data.fill_(ZERO)
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        model.save_pretrained(tmp_path / "out")
        compressor.update_config(tmp_path / "out")
        return tmp_path / "out", scheme.input_activations

    return build


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_with_calibrated_scales_are_no_fault(written, kind, bf16_folder):
    folder, arguments = written(kind)
    found = workflows.inspect(folder, gpu="l4", engine="vllm")
    assert found.faults == ()
    assert found.refusals == ()
    numbers, _, _, symmetric, dynamic = INPUTS[kind]
    name = "rtn-fp8-gtensor-afp8" if numbers == "float" else "rtn-int8-gch-sym-aint8"
    assert {row.name for row in found.schemes} == {name if dynamic else f"{name}-static"}
    assert found.schemes[0].verdict.support == "native"

    weight = read_checkpoint(folder).weight(QUERY)
    original = read_tensor(bf16_folder, f"{QUERY}.weight").float()
    assert (weight.dequantize() - original).abs().max() < 0.05 * original.abs().max()
    assert ("input_zero_point" in weight.extras) == (not symmetric)

    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils.helpers import compute_dynamic_scales_and_zp

    torch.manual_seed(0)
    inputs = torch.randn(1, 6, original.shape[1]) + 0.7
    scale, zero = torch.tensor([SCALE]), torch.tensor([0 if symmetric else ZERO])
    if dynamic:
        scale, zero = compute_dynamic_scales_and_zp(inputs, arguments, torch.nn.Linear(1, 1))
    theirs = fake_quantize(inputs, scale, zero, arguments)
    stored = weight.extras.get("input_scale", scale)
    # The library stores scales in bf16; ours are read as they are stored.
    assert torch.allclose(stored, scale, rtol=2**-8)
    weight.extras["input_scale"] = scale
    ours = activation_simulation(weight.scheme, weight.extras)(inputs)
    step = float(scale.max()) if numbers == "int" else float(inputs.abs().max()) / 8
    different = (ours - theirs).abs() > 1e-5 * inputs.abs().max()
    assert (ours - theirs).abs().max() <= 1.01 * step
    assert different.float().mean() < 0.01, "only ties may fall to either side"
