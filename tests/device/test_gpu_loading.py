"""Our checkpoints on a real GPU in transformers: ``pytest -m gpu tests/device``."""

from __future__ import annotations

import pytest
import torch

from advisor.evaluation.runtime import quantized_model
from advisor.formats.export import write_checkpoint
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import read_tensor, tensor_names
from advisor.schemes import parse_scheme

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
PROMPTS = [list(range(2, 66)), list(range(300, 236, -1))]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def mixed(module):
    """Four kinds of storage side by side, one of them 16 bits."""
    if "layers.0.mlp.down_proj" in module:
        return None
    if "layers.0.self_attn" in module:
        return "rtn-int8-gch-sym"
    return "rtn-fp8-gch" if "self_attn" in module else "rtn-int4-g32-asym"


def quantized(folder, choose):
    weights = {}
    for name in tensor_names(folder):
        module = name.removesuffix(".weight")
        scheme = choose(module) if callable(choose) else choose
        if module.endswith("_proj") and scheme is not None:
            weight = read_tensor(folder, name).to(torch.float32)
            weights[module] = quantize(weight, None, parse_scheme(scheme), QuantizationSettings())
    return weights


def logits_of(folder, where, weights=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=where)
    tokens = torch.tensor(PROMPTS, device=model.device)
    with torch.no_grad():
        if weights is None:
            return model(tokens).logits.float().cpu()
        with quantized_model(model, weights):
            return model(tokens).logits.float().cpu()


@pytest.mark.parametrize(
    ("format", "choose"),
    [
        ("compressed-tensors", "rtn-int4-g64-asym"), ("compressed-tensors", mixed),
        ("compressed-tensors", "nvfp4"),
        ("bitsandbytes", "bnb-nf4"), ("bitsandbytes", "bnb-nf4-dq"), ("bitsandbytes", "bnb-fp4"),
        ("bitsandbytes", "bnb-fp4-dq"), ("bitsandbytes", "llm.int8"),
    ],
)  # fmt: skip
def test_logits_are_those_of_our_simulation(llama_builder, tmp_path, format, choose):
    if format == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    limit = {"compressed-tensors": 0.01, "bitsandbytes": 0.05}[format]
    limit = 0.08 if choose == "llm.int8" else limit  # float16 inside
    source = llama_builder(**SIZES)
    weights = quantized(source, choose)
    write_checkpoint(source, tmp_path / "out", format=format, weights=weights)
    found = logits_of(tmp_path / "out", "cuda")
    expected = logits_of(source, "cpu", weights)
    plain = logits_of(source, "cuda"), logits_of(source, "cpu")
    # Sums of another order move even the 16-bit model's logits.
    device = float((plain[0] - plain[1]).norm() / plain[1].norm())
    difference = float((found - expected).norm() / expected.norm())
    lost = float((plain[1] - expected).norm() / expected.norm())
    print(f"\n{choose}: {difference:.4f}; the device alone {device:.4f}, the scheme {lost:.4f}")
    assert difference < max(4 * device, limit)
