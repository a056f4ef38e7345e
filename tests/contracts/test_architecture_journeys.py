"""The whole journey on what is unlike Llama: tune, apply, verify, and advice before measuring."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import advisor
from advisor.budgets import Budgets
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.formats.read import read_checkpoint
from advisor.models.checkpoint import iterate_tensors
from advisor.models.load import load_model
from advisor.predict.models import load_modelspec

JOURNEYS = {
    "gpt2": "vllm", "opt-350m": "transformers", "qwen2-moe": "vllm", "llama-odd": "transformers",
}  # fmt: skip


def journey(folder, tmp_path, engine, gpu="cpu", **budgets):
    tuning = advisor.tune(
        folder, gpu=gpu, engine=engine, budgets=Budgets.from_text(**budgets), context=64,
        output=tmp_path / "plan.yaml", samples=16, sequence_length=32, evaluation_sequences=4,
        trials=2, sequential=engine == "transformers",
    )  # fmt: skip
    advisor.apply(tuning.plan_path, tmp_path / "out")
    return tuning, advisor.verify(tuning.plan_path, tmp_path / "out")


@pytest.mark.parametrize("name", JOURNEYS)
def test_tune_apply_verify(name, tiny, tmp_path):
    folder, _ = tiny(name)
    spec = load_modelspec(folder)
    size = int(2.0 * spec.parameters - 1.0 * spec.quantizable_parameters + 8192)
    gpu = "rtx-4090" if spec.experts else "cpu"  # vLLM quantizes no experts on CPUs
    tuning, report = journey(folder, tmp_path, JOURNEYS[name], gpu, max_size=f"{size}B")
    assert report.passed, [check for check in report.checks if not check.passed]
    plan = tuning.result.plan
    assert len(plan.scheme.modules) < len(spec.linears)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"]["quant_method"] == plan.scheme.format
    coverage = plan.expert_coverage
    assert (coverage is not None) == (spec.experts > 0)
    if coverage is not None:
        layers = {linear.block for linear in spec.linears if linear.is_expert}
        assert coverage.experts == 4 * len(layers)
        for counts in coverage.layers.values():
            # Every one of 16 x 32 tokens goes to two experts.
            assert sum(map(int, counts.split())) == 2 * 16 * 32
        schemes = {
            plan.scheme.modules.get(linear.name, plan.scheme.default)
            for linear in spec.linears
            if linear.is_expert and linear.block == max(layers)
        }
        assert len(schemes) == 1
    assert bool(plan.fallbacks) == (name == "llama-odd")
    if plan.fallbacks:
        assert sum(row.modules for row in plan.fallbacks) == len(spec.linears)
        assert "divides in_features=60" in plan.fallbacks[0].reason


def test_experts_that_an_engine_does_not_run_quantized_stay_as_they_are(tiny, tmp_path):
    folder, _ = tiny("qwen2-moe")
    spec = load_modelspec(folder)
    experts = [linear for linear in spec.linears if linear.is_expert]
    others = sum(linear.parameters for linear in spec.linears if not linear.is_expert)
    size = int(2.0 * spec.parameters - 1.0 * others + 8192)
    tuning, report = journey(folder, tmp_path, "vllm", max_size=f"{size}B")
    assert report.passed
    plan = tuning.result.plan
    default = plan.scheme.default
    assert {plan.scheme.modules.get(one.name, default) for one in experts} == {"bf16"}
    assert any(name != "bf16" for name in {default, *plan.scheme.modules.values()})
    rows = [row for row in plan.fallbacks if ".experts." in row.first]
    assert sum(row.modules for row in rows) == len(experts)
    assert all("runs experts of" in row.reason for row in rows)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_transformers_unpacks_the_experts_that_were_measured(name, tiny, tmp_path):
    """It knows one scheme for the experts of all layers, and no 16-bit experts beside it."""
    folder, _ = tiny(name)
    spec = load_modelspec(folder)
    size = int(2.0 * spec.parameters - 1.3 * spec.quantizable_parameters + 8192)
    tuning, report = journey(folder, tmp_path, "transformers", max_size=f"{size}B")
    assert report.passed
    scheme = tuning.result.plan.scheme
    of_experts = {
        scheme.modules.get(linear.name, scheme.default)
        for linear in spec.linears
        if linear.is_expert
    }
    assert len(of_experts) == 1
    assert "bf16" not in of_experts
    tokens = torch.arange(3, 33).reshape(2, 15)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    read = read_checkpoint(tmp_path / "out")
    loaded = load_model(folder)
    known = dict(loaded.model.named_parameters(remove_duplicate=False))
    others = {key: value for key, value in read.other_tensors() if key in known}
    weights = {key: read.weight(key) for key in read.modules}
    with torch.no_grad(), quantized_model(loaded.model, weights, others):
        ours = loaded.model(tokens).logits
    with torch.no_grad():
        found = theirs(tokens).logits
    assert (found - ours).norm() < 0.01 * ours.norm()


def test_an_engine_that_does_not_read_the_architecture_is_refused_before_any_work(tiny, tmp_path):
    with pytest.raises(InputError, match=r"transformers loads no compressed-tensors.*vllm"):
        journey(tiny("gpt2")[0], tmp_path, "transformers", max_loss="5%")


def test_every_architecture_gets_advice(case, tiny):
    folder = tiny(case)[0]
    document = advisor.recommend(
        folder, gpu="rtx-4090", engine="transformers", context=64
    ).to_dict()
    stored = sum(tensor.numel() for _, tensor in iterate_tensors(folder))
    assert document["model"]["parameters"] == stored
    assert any(row["feasible"] and row["bits"] < 16 for row in document["candidates"])
