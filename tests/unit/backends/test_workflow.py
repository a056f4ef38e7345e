"""``backends run``, ``apply``, ``verify`` and ``tune --backends``, with a library that is none."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from advisor.backends.environments import environment_of
from advisor.backends.registry import get_backend
from advisor.budgets import Budgets
from advisor.errors import BackendError, InputError, VerificationError, split_errors
from advisor.plan.files import load_plan, save_plan
from advisor.workflows.applying import PLAN_NAME, apply
from advisor.workflows.backend_runs import run_backend
from advisor.workflows.comparing import compare
from advisor.workflows.own_text import load_tokens, own_text_path, save_tokens
from advisor.workflows.tuning import tune
from advisor.workflows.verifying import verify

SHORT = {"samples": 4, "sequence_length": 32, "evaluation_sequences": 4}
TARGET = {"gpu": "cpu", "engine": "transformers"}


def install_as(backend, *names):
    """Mark libraries as installed."""
    for name in names:
        folder = environment_of(get_backend(name))
        shutil.copytree(environment_of(backend), folder, symlinks=True)


@pytest.fixture
def run(fake_backend, prepared, random_llama_folder, tmp_path):
    def go(scheme="gptq-int4-g32-sym", made="rtn-int4-g32-sym", **options):
        fake_backend(act="round", prepared=str(prepared(made)))
        output = tmp_path / "out"
        return run_backend(
            "fake", random_llama_folder, scheme, output, **SHORT, **TARGET, **options
        )

    return go


def test_a_checkpoint_is_measured_like_our_own(run, random_llama_folder, tmp_path):
    events = []
    found = run(progress=events.append).to_dict()
    same = compare(
        random_llama_folder, tmp_path / "out", evaluation_sequences=4, sequence_length=32
    )
    assert found["kl"] == same.kl.model_dump()
    assert found["kl"]["low"] < found["kl"]["value"] < found["kl"]["high"]
    assert found["size_bytes"] == same.size_bytes[1]
    assert (found["backend"], found["version"], found["format"]) == ("fake", "9.9", "gptq")
    assert found["seconds"] == 1.5
    assert "tokens: [4, 32]" in found["notes"]
    own = (random_llama_folder / "tokenizer_config.json").read_text()
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == own
    modes = {path.stat().st_mode for path in (tmp_path / "out").glob("*.safetensors")}
    assert modes == {(tmp_path / "out" / "config.json").stat().st_mode}
    assert {"fake: Loading", "fake: Quantizing", "Measuring"} <= {e.stage for e in events}


def test_what_a_library_writes_where_it_stands_is_not_left_there(
    fake_backend, prepared, random_llama_folder, tmp_path, monkeypatch
):
    """gptqmodel makes a folder of logs in its working directory; relative paths stay the user's."""
    fake_backend(act="round", prepared=str(prepared("rtn-int4-g32-sym")))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for name, folder in (("ADVISOR_BACKENDS", "environments"), ("ADVISOR_CACHE", "cache")):
        monkeypatch.setenv(name, os.path.join("..", folder))
    model = os.path.relpath(random_llama_folder)
    run_backend("fake", model, "gptq-int4-g32-sym", "out", **SHORT, **TARGET)
    assert os.listdir(here) == ["out"]
    names = {path.name for path in (here / "out").iterdir()}
    assert "config.json" in names
    assert "logs" not in names
    apply(here / "out" / PLAN_NAME, "again")
    assert sorted(os.listdir(here)) == ["again", "out"]
    assert list((tmp_path / "cache" / "backends").iterdir()) == []


def test_its_plan_names_the_library_and_can_be_applied_and_verified(run, tmp_path):
    run()
    plan = load_plan(tmp_path / "out" / PLAN_NAME)
    assert plan.backend is not None
    assert (plan.backend.name, plan.backend.version) == ("fake", "9.9")
    assert len(plan.backend.lock_sha256) == 64
    assert plan.settings == {}
    result = apply(tmp_path / "out" / PLAN_NAME, tmp_path / "again")
    assert result.quantized_modules == 14
    report = verify(tmp_path / "out" / PLAN_NAME, tmp_path / "again")
    assert report.passed, report.to_dict()
    assert {check.name for check in report.checks} >= {"schemes", "weights", "quality"}


def test_the_models_own_text_is_taken_from_beside_the_plan(run, tmp_path):
    run(calibration=["self"])
    path = tmp_path / "out" / PLAN_NAME
    plan = load_plan(path)
    assert plan.calibration is not None
    assert (plan.calibration.corpus, plan.calibration.sequences) == ("self", 4)
    written = load_tokens(own_text_path(path), (4, 32))
    assert written is not None
    # Written anew it comes out otherwise elsewhere: what lies beside the plan is what counts.
    save_tokens(own_text_path(path), written.flip(0))
    with pytest.raises(InputError, match="is not the plan's"):
        apply(path, tmp_path / "again")
    save_tokens(own_text_path(path), written)
    shutil.rmtree(tmp_path / "cache" / "texts")
    apply(path, tmp_path / "again")
    assert not (tmp_path / "cache" / "texts").exists()
    beside = load_tokens(own_text_path(tmp_path / "again" / PLAN_NAME), (4, 32))
    assert beside is not None
    assert beside.tolist() == written.tolist()


def test_another_lock_file_is_refused(run, tmp_path):
    run()
    path = tmp_path / "out" / PLAN_NAME
    plan = load_plan(path)
    assert plan.backend is not None
    other = plan.backend.model_copy(update={"lock_sha256": "0" * 64})
    save_plan(plan.model_copy(update={"backend": other}), path)
    with pytest.raises(InputError, match="made with other versions in fake's environment"):
        apply(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_was_not_asked_for_is_an_error(run):
    with pytest.raises(VerificationError, match="asked for gptq-int4-g64-sym"):
        run(scheme="gptq-int4-g64-sym")


def test_a_failure_leaves_no_folder(fake_backend, random_llama_folder, tmp_path):
    fake_backend(act="fail")
    with pytest.raises(BackendError, match="fake failed: ValueError: the model is odd"):
        run_backend(
            "fake", random_llama_folder, "gptq-int4-g32-sym", tmp_path / "out", **SHORT, **TARGET
        )
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_everything_that_is_wrong_is_told_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError) as caught:
        run_backend(
            "llmcompressor", tmp_path / "none", "awq-int3-g32-sym", tmp_path / "file",
            settings=["n_grid=many", "grid=3"], device="tpu", timeout="3parsecs", gpu="rtx-5099",
            engine="vlm", calibration=["nofile"], evaluation=["self"], samples=0, seed=-1,
        )  # fmt: skip
    words = [
        "rtx-5099", "'vlm'", "n_grid", "'grid'", "int4 or int8, but int3", "'tpu'", "--timeout",
        "--samples", "--seed", "the output must be a folder", "'nofile'", "'self'", "none",
    ]  # fmt: skip
    found = split_errors(str(caught.value))
    assert len(found) == len(words)
    assert [word for word, line in zip(words, found, strict=True) if word not in line] == []
    with pytest.raises(InputError, match="unknown backend 'hq'") as caught:
        run_backend("hq", tmp_path, "hqq-int9-g32-asym", tmp_path / "out", settings=["grid=3"])
    assert len(split_errors(str(caught.value))) == 2, "settings are those of a library"


@pytest.mark.parametrize("needs_text", [True, False])
def test_text_that_is_not_looked_at_is_said_to_be_so(
    fake_backend, prepared, random_llama_folder, tmp_path, needs_text
):
    fake_backend(needs_text, act="round", prepared=str(prepared("rtn-int4-g32-sym")))
    found = run_backend(
        "fake", random_llama_folder, "gptq-int4-g32-sym", tmp_path / "out",
        calibration=["builtin:calibration"], **SHORT, **TARGET,
    )  # fmt: skip
    notes = found.to_dict()["notes"]
    said = "gptq-int4-g32-sym is made without text: --calibration changes nothing"
    assert (said in notes) != needs_text
    assert (found.plan.calibration is not None) == needs_text


def test_what_is_not_installed_is_said_before_any_work(random_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_BACKENDS", str(tmp_path / "none"))
    with pytest.raises(BackendError, match="Run: advisor backends install hqq"):
        run_backend("hqq", random_llama_folder, "hqq-int4-g32-asym", tmp_path / "out")
    with pytest.raises(BackendError, match="Run: advisor backends install hqq"):
        tune(random_llama_folder, backends=["hqq"], output=tmp_path / "plan.yaml", **TARGET)


def test_a_library_that_makes_nothing_for_the_engine_is_refused_before_any_work(
    fake_backend, random_llama_folder, llama_builder, tmp_path
):
    """HQQ's checkpoints are in 16 bits, and vLLM 0.32 reads none of bitsandbytes."""
    install_as(fake_backend(), "hqq", "bitsandbytes")
    path = tmp_path / "plan.yaml"
    with pytest.raises(InputError) as caught:
        tune(
            random_llama_folder, backends=["hqq,bitsandbytes"], output=path, gpu="rtx-4090",
            engine="vllm",
        )  # fmt: skip
    lines = split_errors(str(caught.value))
    assert [line.partition(" ")[0] for line in lines] == ["hqq", "bitsandbytes"]
    assert "makes nothing of this model that vllm runs on GeForce RTX 4090" in lines[0]
    assert "Leave bitsandbytes out of --backends, or name another --engine" in lines[1]
    odd = llama_builder(hidden_size=80, num_attention_heads=4, intermediate_size=176)
    with pytest.raises(InputError, match=r"group_size=32 .*in_features=80 .*Leave hqq out"):
        tune(odd, backends=["hqq"], output=path, **TARGET)
    assert list(tmp_path.glob("plan*")) == []


@pytest.fixture
def tuned(fake_backend, prepared, random_llama_folder, tmp_path):
    def go(scheme, act="round", **options):
        job = str(tmp_path / "job.json")
        fake_backend(act=act, prepared=str(prepared(scheme)), keep=job)
        # Its one scheme that fits; 4 bits in groups of 32 or 64 are what ours have too.
        return tune(
            random_llama_folder,
            budgets=Budgets.from_text(max_size="165kB"),
            backends=["fake"],
            output=tmp_path / "plan.yaml",
            trials=2,
            sequential=False,
            context=64,
            **SHORT,
            **TARGET,
            **options,
        )

    return go


def test_it_is_a_finalist_and_loses_where_it_is_worse(tuned):
    tuning = tuned("rtn-int4-g32-asym")
    rows = tuning.to_dict()["finalists"]
    theirs = [row for row in rows if row["backend"] == "fake"]
    assert [row["name"] for row in theirs] == ["gptq-int4-g32-asym"], tuning.to_dict()
    best = min(rows, key=lambda row: row["kl"]["value"])
    assert best["backend"] is None
    assert not theirs[0]["chosen"]
    assert tuning.result.plan.backend is None
    reasons = [row.reason for row in tuning.result.plan.runners_up]
    assert sum("by fake" in reason for reason in reasons) == 1


@pytest.mark.parametrize(("options", "theirs"), [({}, "auto"), ({"device": " CPU"}, "cpu")])
def test_it_computes_where_the_search_was_told_to(tuned, tmp_path, options, theirs):
    tuned("rtn-int4-g32-asym", **options)
    assert json.loads((tmp_path / "job.json").read_text())["device"] == theirs


def test_a_failure_is_a_row_of_the_result(tuned):
    document = tuned("rtn-int4-g32-asym", act="fail").to_dict()
    assert [row["backend"] for row in document["backends_failed"]] == ["fake"]
    assert "ValueError: the model is odd" in document["backends_failed"][0]["reason"]
    assert all(row["backend"] is None for row in document["finalists"])


def test_what_is_too_slow_for_the_search_is_not_made(tuned, monkeypatch):
    asked = []

    def is_fast(task, offered, pace, assignment, carried):
        asked.append(carried)
        return False

    monkeypatch.setattr("advisor.search.run.is_fast", is_fast)
    document = tuned("rtn-int4-g32-asym", act="fail").to_dict()
    (row,) = document["backends_failed"]
    assert row["scheme"] == "none"
    assert row["reason"].endswith("fits 165,000 bytes, and is as fast as was asked for")
    assert "gptq" in asked
    assert document["finalists"], "the search's own mixtures are fast by construction"


def test_where_it_wins_its_plan_has_it_made_again(tuned, monkeypatch, tmp_path):
    def theirs(finalists, goal):
        return next((f for f in finalists if f.mixture.backend), finalists[0])

    monkeypatch.setattr("advisor.search.run.choose", theirs)
    tuning = tuned("rtn-int4-g32-asym")
    plan = load_plan(tmp_path / "plan.yaml")
    assert plan == tuning.result.plan
    assert plan.backend is not None
    assert (plan.backend.name, plan.backend.scheme) == ("fake", "gptq-int4-g32-asym")
    assert plan.settings == {}
    assert plan.calibration is not None
    result = apply(tmp_path / "plan.yaml", tmp_path / "made")
    assert result.size_bytes == plan.expected.size_bytes
    report = verify(tmp_path / "plan.yaml", tmp_path / "made")
    assert report.passed, report.to_dict()


def test_a_search_that_goes_on_does_not_make_it_again(tuned, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr("advisor.search.run.check_disk", lambda use: counted.append(use.outside))
    first = tuned("rtn-int4-g32-asym").to_dict()
    kept = list((tmp_path / "plan.yaml.search" / "backends").iterdir())
    assert [path.name.partition("-")[0] for path in kept] == ["fake"]
    (kept[0] / "marked").touch()
    again = tune(
        first["plan"]["model"]["id"], budgets=Budgets.from_text(max_size="165kB"),
        backends=["fake"], output=tmp_path / "plan.yaml", trials=2, sequential=False, context=64,
        **SHORT, **TARGET,
    ).to_dict()  # fmt: skip
    assert (kept[0] / "marked").exists()
    assert again["finalists"] == first["finalists"]
    written = sum(path.stat().st_size for path in kept[0].glob("*.safetensors"))
    assert counted == [pytest.approx(written, abs=8000), 0]  # but for headers; then it is there
