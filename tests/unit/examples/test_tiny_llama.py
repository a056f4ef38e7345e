"""The shipped small model is what its README says, and rounding costs it what was measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from advisor.calibration.corpora import builtin_documents

EXAMPLES = Path(__file__).parents[3] / "examples"
FOLDER = EXAMPLES / "tiny-llama"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    file = EXAMPLES / "train_tiny_llama.py"
    specification = importlib.util.spec_from_file_location("train_tiny_llama", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_shape_and_size() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["hidden_size"] % 128 == config["intermediate_size"] % 128 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert "quantization_config" not in config
    assert (FOLDER / "model.safetensors").stat().st_size < 12_000_000


def test_rounding_costs_what_was_measured(script: ModuleType) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")
    recorded = json.loads((FOLDER / "measured.json").read_text())["measured"]
    stream = script.to_stream(tokenizer, list(builtin_documents("evaluation").values()))
    every_seventh = script.windows(stream)[::7]
    measured = script.measure(model, every_seventh)
    assert measured["bf16"]["perplexity"] == pytest.approx(recorded["bf16"]["perplexity"], rel=0.2)
    costs = [measured[f"rtn-int{bits}-g128-sym"]["kl_nats"] for bits in (8, 6, 5, 4, 3, 2)]
    expected = [recorded[f"rtn-int{bits}-g128-sym"]["kl_nats"] for bits in (8, 6, 5, 4, 3, 2)]
    assert costs == pytest.approx(expected, rel=0.25)


def test_int8_costs_nearly_nothing_int4_something_and_int3_a_lot() -> None:
    recorded = json.loads((FOLDER / "measured.json").read_text())["measured"]
    loss = {bits: recorded[f"rtn-int{bits}-g128-sym"]["loss_percent"] for bits in (8, 4, 3)}
    assert abs(loss[8]) < 0.1
    assert 1 < loss[4] < 2
    assert loss[3] > 4 * loss[4]


def test_text_that_is_in_the_evaluation_part_is_never_trained_on(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = max(builtin_documents("evaluation").values(), key=len)
    monkeypatch.setattr(script, "stdlib_docstrings", lambda: ["a clean docstring", text[:2000]])
    monkeypatch.setattr(script, "stdlib_sources", lambda: ["clean = 1", f"quoted = {text[:2000]}"])
    training, validation = script.split_text()
    assert {"a clean docstring", "clean = 1"} < {*training, *validation}
    assert f"quoted = {text[:2000]}" not in training
    assert text[:2000] not in training + validation
