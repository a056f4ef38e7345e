from __future__ import annotations

import pytest

from advisor import workflows
from advisor.errors import InputError
from advisor.hardware.catalogue import find_profile
from advisor.plan.schema import ModelIdentity
from advisor.workflows.resolve import (
    check_preference,
    planned_model_folder,
    resolve_engine,
    resolve_hardware,
    resolve_model_folder,
)


def test_hardware_by_name_and_cpu():
    assert resolve_hardware("RTX 4090").id == "rtx4090"
    assert resolve_hardware(" CPU ").kind == "cpu"


def test_engine_is_the_usual_one_of_the_hardware():
    assert resolve_engine("auto", find_profile("l4")) == "vllm"
    assert resolve_engine(" VLLM ", find_profile("l4")) == "vllm"
    # Nothing of vLLM runs on a P100: sm_60 is older than it supports.
    assert resolve_engine("auto", find_profile("p100")) == "llama.cpp"


def test_unknown_engine_lists_all_and_suggests():
    with pytest.raises(InputError, match=r"use one of .*llama\.cpp.*Did you mean 'sglang'"):
        resolve_engine("sglangg", find_profile("l4"))


@pytest.mark.parametrize("prefer", ["accuracy", "size", "speed", "balanced"])
def test_preferences(prefer):
    assert check_preference(prefer) == prefer


def test_a_model_folder_is_taken_as_it_is(tmp_path):
    assert resolve_model_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/no such", "word", "a/b/c"])
def test_what_is_no_hugging_face_id_is_never_downloaded(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match="no model folder at"):
        resolve_model_folder(name)


def test_a_plan_s_model_is_asked_for_at_its_commit_and_may_have_moved(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(name, *, revision, **_):
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    identity = ModelIdentity(
        id="someone/model", revision="c0ffee", architecture="LlamaForCausalLM", parameters=1,
        quantizable_parameters=1, config_sha256="", tokenizer_sha256="", weights_sha256="",
    )  # fmt: skip
    assert planned_model_folder(identity, None) == tmp_path
    assert asked == [("someone/model", "c0ffee")]
    gone = identity.model_copy(update={"id": "./gone", "revision": None})
    with pytest.raises(InputError, match=r"no model folder at \./gone\..* say --model PATH"):
        planned_model_folder(gone, None)
    assert planned_model_folder(gone, tmp_path) == tmp_path


def test_a_download_that_fails_says_why(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no route to host\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"someone/model is neither .*no route to host\. Check"):
        resolve_model_folder("someone/model")


def test_no_network_is_said_as_every_failed_download_is(monkeypatch):
    """httpx, which huggingface_hub uses since 1.0, raises what is no OSError."""
    import httpx
    import huggingface_hub

    def fail(*_, **__):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=r"neither .* Name or service not known\. Check"):
        resolve_model_folder("someone/model", "c0ffee")


def test_every_workflow_of_the_documentation_exists():
    for name in (
        "profile", "recommend", "tune", "apply", "verify", "report", "predict", "inspect",
        "compare", "doctor", "demo",
    ):  # fmt: skip
        assert callable(getattr(workflows, name))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        workflows.nonsense  # noqa: B018


def test_the_package_offers_the_same_functions():
    import advisor

    for name in ("profile", "recommend", "tune", "apply", "verify"):
        assert getattr(advisor, name) is getattr(workflows, name)
