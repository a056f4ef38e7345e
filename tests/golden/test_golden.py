"""What others rely on word for word: options, the plan's YAML, the keys of recommend --json.

After a change on purpose: ``UPDATE_GOLDEN=1 pytest tests/golden``, and read the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from advisor.cli.main import app
from advisor.plan.files import dump_plan, load_plan, save_plan
from advisor.workflows import recommend

HERE = Path(__file__).parent


def commands():
    """Every command with its path, groups included."""

    def walk(path, command):
        yield path, command
        for name, child in sorted(getattr(command, "commands", {}).items()):
            yield from walk(f"{path} {name}", child)

    return dict(walk("advisor", typer.main.get_command(app)))


def describe(path, command):
    """Options, defaults and help of a command; how it is drawn is left to the library."""
    lines = [path, *(f"    {line}".rstrip() for line in (command.help or "").splitlines())]
    for parameter in command.params:
        names = " ".join(getattr(parameter, "opts", [parameter.name]))
        kind = parameter.metavar or ""
        default = parameter.default
        shown = f" [{default}]" if default not in (None, False, [], "", ()) else ""
        required = " (required)" if parameter.required else ""
        help_text = " ".join((getattr(parameter, "help", "") or "").split())
        lines.append(f"  {names} {kind}{shown}{required}: {help_text}".replace(" :", ":"))
    return "\n".join(lines)


def test_options_and_their_help():
    found = "\n\n".join(describe(path, command) for path, command in commands().items()) + "\n"
    golden = HERE / "help.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(found, encoding="utf-8")
    assert found == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", commands())
def test_help_fits_eighty_columns(path, capsys, monkeypatch):
    from advisor.cli.main import main

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    with pytest.raises(SystemExit) as stop:
        main([*path.split()[1:], "--help"])
    text = capsys.readouterr().out
    assert not stop.value.code
    assert f"Usage: {path}" in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for parameter in commands()[path].params:
        for name in getattr(parameter, "opts", ()):
            assert not name.startswith("--") or name in text


def test_a_plan_keeps_its_text(tmp_path):
    golden = HERE / "plan.yaml"
    text = golden.read_text(encoding="utf-8")
    plan = load_plan(golden)
    assert dump_plan(plan) == text
    save_plan(plan, tmp_path / "plan.yaml")
    assert (tmp_path / "plan.yaml").read_text(encoding="utf-8") == text
    assert load_plan(tmp_path / "plan.yaml") == plan


TOP = {
    "schema_version", "model", "hardware", "engine", "budgets", "recommended", "candidates",
    "relaxation", "serve",
}  # fmt: skip
CANDIDATE = {
    "name", "method", "bits", "group_size", "symmetric", "format", "kernel", "size_bytes",
    "bits_per_weight", "memory_bytes", "loss", "decode_tokens_per_s", "prefill_tokens_per_s",
    "speedup_over_16bit", "quantization_cost", "feasible", "violations",
}  # fmt: skip
NESTED = {
    "kernel": {"support", "name", "reason", "source"},
    "memory_bytes": {"weights", "kv_cache", "activations", "overhead", "total"},
    "loss": {"low", "expected", "high", "basis", "sources", "collapse_risk"},
    "decode_tokens_per_s": {"low", "expected", "high"},
    "prefill_tokens_per_s": {"low", "expected", "high"},
    "quantization_cost": {"minutes", "peak_memory_bytes"},
}


@pytest.fixture(scope="module")
def documents():
    from advisor.budgets import Budgets

    def ask(**limits):
        budgets = Budgets.from_text(**limits)
        return recommend("llama-3.1-8b", gpu="l4", engine="vllm", budgets=budgets).to_dict()

    return {"fits": ask(max_size="6GB"), "nothing": ask(max_size="1GB", max_loss="0.1%")}


@pytest.mark.parametrize("which", ["fits", "nothing"])
def test_recommend_has_the_documented_keys(documents, which):
    document = documents[which]
    assert document.keys() >= TOP
    assert document["schema_version"] == 1
    assert {"id", "parameters", "quantizable_parameters"} <= document["model"].keys()
    for row in document["candidates"]:
        assert row.keys() >= CANDIDATE, row["name"]
        assert row["kernel"]["support"] in ("native", "weight-only", "emulated", "none")
        for key, names in NESTED.items():
            assert row[key] is None or row[key].keys() >= names, (row["name"], key)
        for violation in row["violations"]:
            assert violation.keys() >= {"budget", "limit", "value"}


def test_recommended_is_the_first_candidate(documents):
    document = documents["fits"]
    assert document["recommended"] == document["candidates"][0]["name"]
    assert document["relaxation"] is None
    assert document["candidates"][0]["size_bytes"] <= 6e9
    (violation,) = next(
        row["violations"] for row in document["candidates"] if row["name"] == "bf16"
    )
    assert (violation["budget"], violation["limit"]) == ("max_size", 6_000_000_000)
    # 8 030 261 248 parameters in two bytes each, and the files' headers.
    assert violation["value"] == pytest.approx(16_060_522_496, rel=1e-5)


def test_nothing_recommended_comes_with_relaxations(documents):
    document = documents["nothing"]
    assert document["recommended"] is None
    assert document["serve"] is None
    assert document["relaxation"]
    for change in document["relaxation"]:
        assert change.keys() >= {"budget", "from", "to", "candidate"}
    assert not any(row["feasible"] for row in document["candidates"])


def test_predict_has_the_documented_keys():
    from advisor.workflows import predict

    document = predict("llama-3.1-8b", "gptq-int4-g128-sym", gpu="l4", engine="vllm").to_dict()
    assert document.keys() == {"schema_version", "model", "hardware", "engine", "candidate"}
    assert document["candidate"].keys() >= CANDIDATE


def test_version_is_the_packages():
    import advisor

    done = subprocess.run(
        [sys.executable, "-c", "from advisor.cli.main import main; main()", "--version"],
        capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(HERE.parents[1])},
    )  # fmt: skip
    assert done.stdout == f"advisor {advisor.__version__}\n"
