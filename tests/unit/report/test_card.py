"""The model card: what the hub reads, the plan's figures, and nothing of one machine."""

from __future__ import annotations

from pathlib import Path

import yaml

from advisor.plan.files import load_plan
from advisor.report.card import render_card

PLAN = Path(__file__).parents[2] / "golden" / "plan.yaml"
MODULES = {
    "model.layers.0.mlp.down_proj": "gptq-int5-g64-sym", "model.layers.0.mlp.up_proj":
    "gptq-int4-g64-sym", "model.layers.1.mlp.up_proj": "gptq-int4-g64-sym",
    "model.layers.1.self_attn.o_proj": "bf16",
}  # fmt: skip
FILES = {"model-00001-of-00002.safetensors": 100_000, "model-00002-of-00002.safetensors": 18_432}


def card(**changes) -> str:
    plan = load_plan(PLAN)
    model = plan.model.model_copy(update={"id": changes.pop("id", plan.model.id)})
    return render_card(plan.model_copy(update={"model": model, **changes}), MODULES, FILES)


def test_front_matter_is_what_the_hub_reads():
    _, front, _ = card(id="HuggingFaceTB/SmolLM2-135M").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "quantized_by": "quantization-advisor",
        "tags": ["quantized", "compressed-tensors", "4-bit", "5-bit", "transformers"],
    }


def test_figures_come_with_their_intervals_and_texts():
    text = card()
    assert "| weight files | 118 kB |" in text
    assert "| KL from the 16-bit model, nats per token | 0.0192 [0.0171, 0.0213] |" in text
    assert "| increase of perplexity | 2.13% [1.54, 2.72] |" in text
    assert "| perplexity | 21.73 (16-bit: 21.28) |" in text
    assert "builtin:evaluation: 32 sequences of 256 tokens, seed 0, sha256 70ce4571e7a170ce" in text
    assert "| gptq-int4-g64-sym | 2 |" in text
    assert "transformers serve ." in text


def test_what_was_not_measured_is_said():
    plan = load_plan(PLAN)
    guessed = plan.expected.model_copy(update={"basis": "score", "kl": None, "loss": None})
    text = card(expected=guessed)
    assert "not measured" in text
    assert "KL" not in text


def test_the_same_plan_gives_the_same_bytes_and_no_paths():
    plan = load_plan(PLAN)
    text = plan.evaluation.model_copy(update={"corpus": "/home/me/secret/a.txt,builtin:x"})
    first = card(id="/home/me/models/tiny", evaluation=text)
    assert first == card(id="/home/me/models/tiny", evaluation=text)
    assert "/home" not in first
    assert "a.txt, builtin:x" in first
    assert "# tiny, mixed-4.25bpw" in first


def test_the_card_names_what_computed():
    assert "transformers 5.17.0, on NVIDIA H100 80GB HBM3." in card()
    assert "transformers 5.17.0." in card(computed_on=None)


def test_the_card_says_where_budgets_are_not_met():
    assert "Not within" not in card()
    text = card(unmet="KL 0.0500 (0.0400 to 0.0600) exceeds 0.01")
    assert "only nearest to them: KL 0.0500 (0.0400 to 0.0600) exceeds 0.01.\n" in text
    assert text.index("Not within the budgets") < text.index("## Figures")


def test_a_server_is_told_the_type_that_the_kernel_is_bound_to():
    engine = load_plan(PLAN).engine
    narrow = engine.kernel.model_copy(update={"dtype": "float16"})
    served = card(engine=engine.model_copy(update={"name": "vllm", "kernel": narrow}))
    assert " --dtype half\n" in served
    assert "--dtype" not in card(engine=engine.model_copy(update={"name": "vllm"}))
