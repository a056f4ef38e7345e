"""Everything that is wrong with a request is told at once."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from advisor import workflows
from advisor.budgets import BUDGET_NAMES, Budgets
from advisor.errors import InputError, join_errors, split_errors
from advisor.formats import folder
from advisor.workflows.checking import check_output, check_request


def complaints(call) -> list[str]:
    with pytest.raises(InputError) as caught:
        call()
    return split_errors(str(caught.value))


BAD = {"max_size": "6XB", "max_loss": "3x"}


def test_advice_names_every_offender_in_one_go():
    found = complaints(
        lambda: workflows.recommend(
            "nosuchmodel", gpu="rtx-5099", engine="vlm", budgets=BAD, prefer="fast"
        )
    )
    words = ["--max-size", "--max-loss", "--prefer", "rtx-5099", "'vlm'", "'nosuchmodel'"]
    assert [next(w for w in words if w in line) for line in found] == words


def test_prediction_names_the_scheme_and_the_release_too():
    found = complaints(
        lambda: workflows.predict("llama-3.1-8b", "foo-int4", gpu="nope", engine="vllm==0.1")
    )
    assert len(found) == 3
    assert "Use one of: rtn, gptq" in found[2]
    assert "releases 0.23 to 0.32" in found[1]


def test_every_gpu_of_a_comparison_is_looked_up():
    found = complaints(
        lambda: workflows.compare_gpus("llama-3.1-8b", ["l4", "foo", "bar"], budgets=BAD)
    )
    assert len(found) == 4
    assert "'foo'" in found[2]
    assert "'bar'" in found[3]


def test_tune_checks_texts_libraries_and_places_before_it_loads_a_model(tmp_path):
    found = complaints(
        lambda: workflows.tune(
            tmp_path / "none", gpu="rtx-5099", engine="auto", budgets=BAD, sampler="foo",
            effort="slow", time_budget="3parsecs", max_disk="1XX",
            calibration=["nofile", "hf:some@2"],
            evaluation=[f"{tmp_path}/gone@2", "builtin:evaluation"], backends=["foo,hqq"],
            slices=["nonsense"], output=tmp_path, context=0, batch=1.5, samples=0, trials=-1,
            sequence_length=1, evaluation_sequences=1, seed=2**32,
        )
    )  # fmt: skip
    words = [
        "--max-size", "--max-loss", "rtx-5099", "--context must be at least 1, but got 0",
        "--batch must be a whole number, but got 1.5", "--samples must be at least 1",
        "--sequence-length must be at least 2", "--evaluation-sequences must be at least 2",
        "--trials must be at least 1, but got -1", "--seed must be at most 4294967295",
        "--time-budget", "--max-disk", "--output",
        "--sampler", "--effort must be one of quick, full", "'nofile'", "backend 'foo'", "gone'",
        "--slice", "no model folder",
    ]  # fmt: skip
    assert [next(w for w in words if w in line) for line in found] == words


def test_a_good_request_is_resolved_and_its_model_not_looked_up_twice():
    def looked_up():
        raise AssertionError

    request = check_request(
        gpu="l4", engine="vllm==0.27", budgets={"max_size": "6GB"}, late=[looked_up]
    )
    assert request.hardware.id == "l4"
    assert request.engine == "vllm==0.27"
    assert request.budgets.max_size_bytes == 6 * 10**9


@pytest.mark.parametrize("messages", [["one"], ["a", "b: c"], ["x\n  y", "z", "w"]])
def test_splitting_undoes_joining(messages):
    assert split_errors(join_errors(messages)) == messages


def test_two_places_are_both_looked_at(tmp_path):
    found = complaints(lambda: workflows.verify(tmp_path / "p.yaml", tmp_path / "out"))
    assert ["no plan at" in found[0], "no checkpoint at" in found[1]] == [True, True]
    found = complaints(lambda: workflows.compare(tmp_path / "a", tmp_path / "b"))
    assert [line.split(" holds")[0] for line in found] == [f"{tmp_path}/a", f"{tmp_path}/b"]


def test_a_place_that_may_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    check_output(tmp_path / "new" / "plan.yaml")
    monkeypatch.setattr(folder.os, "access", lambda place, mode: place != tmp_path.resolve())
    with pytest.raises(InputError, match=r"cannot be written: no file can be made in "):
        check_output(tmp_path / "new" / "plan.yaml")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="Linux alone has /proc")
def test_a_place_whose_rights_say_more_than_it_takes_is_refused_too():
    with pytest.raises(InputError, match="no file can be made in /proc"):
        check_output(Path("/proc/new/plan.yaml"))


def test_a_profile_of_no_kind_is_not_called_a_gpu():
    [found] = complaints(lambda: workflows.show_profile("vlm"))
    assert found.startswith("no device, model or engine is called 'vlm'. Did you mean 'vllm'?")


def test_calls_from_python_are_refused_in_words_as_the_command_is():
    """Not with what Python says of a missing method, and no text is taken for its letters."""

    def advice(**changes):
        return complaints(lambda: workflows.recommend("llama-3.1-8b", **{"gpu": "l4"} | changes))

    assert advice(gpu=None, engine=3) == [
        "gpu must be a text, but got None.", "engine must be a text, but got 3.",
    ]  # fmt: skip
    assert "unknown budget 'max_sise'. Did you mean 'max_size'" in advice(
        budgets={"max_sise": "6GB"}
    )[0]  # fmt: skip
    assert "budgets must be Budgets, or texts by name" in advice(budgets="6GB")[0]
    assert advice(context="4096", batch=1.5) == [
        "--context must be a whole number, but got '4096'.",
        "--batch must be a whole number, but got 1.5.",
    ]
    assert complaints(lambda: workflows.tune("m", calibration="code.txt", slices="a=b")) == [
        "calibration must be a list of texts, but got 'code.txt'. Use ['code.txt'].",
        "slices must be a list of texts, but got 'a=b'. Use ['a=b'].",
    ]
    (found,) = complaints(lambda: workflows.compare_gpus("llama-3.1-8b", "l4,a10"))
    assert found == "gpus must be a list of texts, but got 'l4,a10'. Use ['l4,a10']."


def test_every_budget_of_a_mapping_is_known():
    parameters = inspect.signature(Budgets.from_text).parameters
    assert tuple(parameters) == BUDGET_NAMES
