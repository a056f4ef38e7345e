"""A tiny random Llama in bf16, and quantized weights of it."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import read_tensor, tensor_names
from advisor.schemes import parse_scheme


def _statistics(weight):
    """Uncorrelated inputs, none above 3."""
    width = weight.shape[1]
    return LayerStatistics(64, 64 * torch.eye(width), torch.full((width,), 3.0), torch.ones(width))


@pytest.fixture(scope="session")
def bf16_folder(random_llama_folder, tmp_path_factory):
    """The tiny random Llama, stored in bf16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("formats") / "bf16"
    model = AutoModelForCausalLM.from_pretrained(random_llama_folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_llama_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def quantized(bf16_folder):
    """Quantize by ``choose(module) -> scheme name or None``; a name alone is for all modules."""

    def build(choose):
        pick = choose if callable(choose) else lambda _: choose
        weights = {}
        for name in tensor_names(bf16_folder):
            module = name.removesuffix(".weight")
            if not module.endswith("_proj") or pick(module) is None:
                continue
            weight = read_tensor(bf16_folder, name).to(torch.float32)
            scheme = parse_scheme(pick(module))
            statistics = _statistics(weight) if scheme.static_activation else None
            weights[module] = quantize(weight, statistics, scheme, QuantizationSettings())
        return weights

    return build
