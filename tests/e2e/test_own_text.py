"""Calibrating on what the model writes itself: tune, apply, and apply where its text is lost."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from advisor import workflows
from advisor.budgets import Budgets
from advisor.calibration.own_text import write
from advisor.errors import InputError
from advisor.plan.files import load_plan
from advisor.plan.hashing import sha256_file
from advisor.workflows.demonstration import example_model
from advisor.workflows.texts import check_sources

MIX = ["self@1", "builtin:calibration@1"]
SETTINGS = {
    "gpu": "cpu", "engine": "transformers", "context": 256, "samples": 8, "sequence_length": 64,
    "evaluation_sequences": 4, "trials": 3, "sequential": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folder with a plan, its own text and the checkpoint made of them; and its cache."""
    folder = tmp_path_factory.mktemp("own")
    stages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVISOR_CACHE", str(folder / "cache"))
        workflows.tune(
            example_model(), budgets=Budgets(max_size_bytes=3_100_000), calibration=MIX,
            output=folder / "plan.yaml", progress=lambda event: stages.append(event.stage),
            **SETTINGS,
        )  # fmt: skip
        workflows.apply(folder / "plan.yaml", folder / "quantized")
    assert "Writing text" in stages
    return folder


@pytest.fixture
def elsewhere(tuned, tmp_path, monkeypatch):
    """The plan and its text on a machine with an empty cache."""
    for name in ("plan.yaml", "plan.yaml.self.npy"):
        shutil.copy(tuned / name, tmp_path / name)
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def weights(folder):
    return sha256_file(folder / "model.safetensors")


def another_machine(monkeypatch):
    """Let the model write other text than before."""

    def other(loaded, *, seed, **settings):
        return write(loaded, seed=seed + 1, **settings)

    monkeypatch.setattr("advisor.workflows.own_text.write", other)


def test_the_plan_says_what_it_was_calibrated_on(tuned):
    plan = load_plan(tuned / "plan.yaml")
    assert plan.calibration.corpus == "self@1 + builtin:calibration@1"
    assert plan.calibration.sequences == 8
    assert plan.calibration_fit is not None, "how well it stands for the evaluation text"
    kept = np.load(tuned / "plan.yaml.self.npy")
    assert kept.shape == (4, 64)
    travelling = tuned / "quantized" / "advisor-plan.yaml.self.npy"
    assert travelling.read_bytes() == (tuned / "plan.yaml.self.npy").read_bytes()


def test_the_kept_text_serves_on_another_machine(tuned, elsewhere, monkeypatch):
    another_machine(monkeypatch)
    workflows.apply(elsewhere / "plan.yaml", elsewhere / "quantized")
    assert weights(elsewhere / "quantized") == weights(tuned / "quantized")


def test_a_lost_text_is_written_again(tuned, elsewhere):
    (elsewhere / "plan.yaml.self.npy").unlink()
    workflows.apply(elsewhere / "plan.yaml", elsewhere / "quantized")
    assert weights(elsewhere / "quantized") == weights(tuned / "quantized")
    assert (elsewhere / "quantized" / "advisor-plan.yaml.self.npy").is_file()


def test_a_text_that_comes_out_otherwise_is_refused(elsewhere, monkeypatch):
    (elsewhere / "plan.yaml.self.npy").unlink()
    another_machine(monkeypatch)
    with pytest.raises(InputError, match=r"otherwise than when the plan was made.*\.self\.npy"):
        workflows.apply(elsewhere / "plan.yaml", elsewhere / "quantized")
    assert not (elsewhere / "quantized").exists()


def test_a_text_that_was_edited_is_refused(elsewhere):
    path = elsewhere / "plan.yaml.self.npy"
    tokens = np.load(path)
    tokens[2, 5] += 1
    np.save(path, tokens)
    with pytest.raises(InputError, match="is not the plan's"):
        workflows.apply(elsewhere / "plan.yaml", elsewhere / "quantized")


def test_a_pickled_text_is_not_read(elsewhere):
    path = elsewhere / "plan.yaml.self.npy"
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    workflows.apply(elsewhere / "plan.yaml", elsewhere / "quantized")  # it was written again


def test_a_search_takes_the_text_of_the_one_before(tuned, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(tuned / "cache"))
    monkeypatch.setattr("advisor.workflows.own_text.write", None)
    from advisor.models.load import load_model
    from advisor.workflows.own_text import OwnText

    again = OwnText(load_model(example_model()))(4, 64, 0)
    kept = np.load(tuned / "plan.yaml.self.npy")
    assert torch.equal(again.tokens, torch.from_numpy(kept).long())


def tune(*arguments):
    """The arguments of a small search."""
    return [
        "tune", example_model(), "--gpu", "cpu", "--engine", "transformers", "--context", "256",
        "--samples", "4", "--sequence-length", "64", "--evaluation-sequences", "4", "--trials", "2",
        "--no-sequential", "--max-size", "3.1MB", *arguments,
    ]  # fmt: skip


def test_the_command_takes_the_models_own_text_alone(advisor, workplace, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(workplace.folder / "cache"))
    outcome = advisor(*tune("--calibration", "self", "--json"))
    assert outcome.code == 0
    text = outcome.document["plan"]["calibration"]
    assert (text["corpus"], text["sequences"]) == ("self", 4)
    assert text["sha256"] == text["tokens_sha256"], "the text is its tokens"
    assert (workplace.folder / "plan.yaml.self.npy").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--evaluation", "self"), "not for evaluation"),
        (("--slice", "own=self"), "not for slice own"),
        (("--calibration", "self", "--calibration", "builtin:calibration"), "self@1"),
        (("--calibration", "sefl"), "Did you mean 'self'"),
    ],
)
def test_where_it_cannot_serve(arguments, message, advisor, workplace):
    outcome = advisor(*tune(*arguments))
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not (workplace.folder / "plan.yaml").exists()


def test_a_folder_of_that_name_must_be_told_apart(advisor, workplace):
    (workplace.folder / "self").mkdir()
    workplace.text("self/a.txt", "some words of my own " * 4000)
    outcome = advisor(*tune("--calibration", "self@2", "--calibration", "builtin:calibration@1"))
    assert outcome.code == 2
    assert "write ./self for that" in " ".join(outcome.err.split())
    check_sources(["./self@2", "builtin:calibration@1"])
