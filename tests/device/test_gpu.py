"""On a real CUDA device, where there is one: ``pytest -m gpu tests/device/test_gpu.py``."""

from __future__ import annotations

import pytest
import torch

from advisor import workflows
from advisor.budgets import Budgets
from advisor.models.device import accelerators, choose_device, device_memory, device_name
from advisor.models.load import load_model
from advisor.workflows.demonstration import example_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SETTINGS = {
    "gpu": "cpu", "engine": "transformers", "context": 256, "samples": 8,
    "sequence_length": 64, "evaluation_sequences": 8, "trials": 6,
    "budgets": Budgets(max_size_bytes=3_100_000),
}  # fmt: skip


def test_the_device_is_seen():
    first = accelerators()[0]
    free, total = device_memory(first)
    assert 0 < free <= total
    assert device_name(first) == torch.cuda.get_device_name(0)
    assert choose_device("auto", 1).device.type == "cuda"


def test_logits_are_those_of_the_cpu():
    tokens = torch.arange(2, 66)[None]
    here, there = load_model(example_model()), load_model(example_model(), device="cuda")
    with torch.no_grad():
        ours, theirs = there.model(tokens).logits, here.model(tokens).logits
    assert ours.device.type == "cpu"  # they come back to where the tokens were
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()
    held = [name for name, value in there.model.named_parameters() if value.is_cuda]
    assert held == []


def test_the_journey_gives_the_plan_of_the_cpu(tmp_path, monkeypatch):
    plans, tensors = [], []
    for device in ("cpu", "cuda", "cuda"):
        folder = tmp_path / f"{len(plans)}-{device}"
        monkeypatch.setenv("ADVISOR_CACHE", str(folder / "cache"))
        torch.cuda.reset_peak_memory_stats()
        tuned = workflows.tune(
            example_model(), output=folder / "plan.yaml", device=device, **SETTINGS
        )
        applied = workflows.apply(folder / "plan.yaml", folder / "out", device=device)
        assert workflows.verify(folder / "plan.yaml", folder / "out", device=device).passed
        plans.append(tuned.result.plan)
        tensors.append({k: v for k, v in applied.files.items() if k.endswith("safetensors")})
    assert torch.cuda.max_memory_allocated() < 2 * 10**9
    assert plans[1].computed_on.name == torch.cuda.get_device_name(0)
    assert plans[1].scheme.name == plans[0].scheme.name
    assert plans[1].expected.kl.value == pytest.approx(plans[0].expected.kl.value, rel=0.02)
    assert tensors[1] == tensors[2]  # one device, one result
