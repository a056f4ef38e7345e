"""The tiny random Llama in bf16, and checkpoints of it in every format."""

from __future__ import annotations

import pytest
import torch

SCHEMES = {
    "gptq": "gptq-int4-g32-sym-actorder", "awq": "awq-int4-g32-asym",
    "compressed-tensors": "rtn-int4-g32-asym", "bitsandbytes": "bnb-nf4-dq", "gguf": "gguf-q4_0",
}  # fmt: skip


@pytest.fixture(scope="session")
def original(random_llama_folder, tmp_path_factory):
    """The tiny random Llama, stored in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("import") / "bf16"
    model = AutoModelForCausalLM.from_pretrained(random_llama_folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_llama_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoints(original, tmp_path_factory):
    """Write a checkpoint once and return its folder: ``checkpoints("gptq")``."""
    from advisor.calibration.statistics import LayerStatistics
    from advisor.formats.export import write_checkpoint
    from advisor.methods.registry import quantize
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.checkpoint import read_tensor, tensor_names
    from advisor.schemes import parse_scheme

    base = tmp_path_factory.mktemp("checkpoints")

    def statistics(in_features):
        inputs = torch.randn(128, in_features, generator=torch.Generator().manual_seed(1))
        inputs *= torch.linspace(0.2, 3.0, in_features)
        return LayerStatistics(128, inputs.t() @ inputs, inputs.abs().amax(0), inputs.abs().sum(0))

    def build(name, scheme=None):
        scheme = scheme or SCHEMES[name]
        folder = base / f"{name}-{scheme}"
        if folder.exists():
            return folder
        weights = {}
        for tensor in tensor_names(original):
            module = tensor.removesuffix(".weight")
            if module.endswith("_proj"):
                weight = read_tensor(original, tensor).to(torch.float32)
                weights[module] = quantize(
                    weight, statistics(weight.shape[1]), parse_scheme(scheme),
                    QuantizationSettings(),
                )  # fmt: skip
        write_checkpoint(original, folder, format=name, weights=weights)
        return folder

    return build
