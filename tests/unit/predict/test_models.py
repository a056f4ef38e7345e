"""Names resolve as people type them, offline, without parsing the whole catalogue."""

from __future__ import annotations

import json

import pytest

from advisor.errors import InputError
from advisor.plan.data import data_files
from advisor.predict import models
from advisor.predict.models import load_modelspec, load_profile, name_notes


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("tiny-llama-1.1b", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_names_in_any_case_and_by_alias(name, found):
    assert load_modelspec(name).id == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gemma-3-12b", "google/gemma-3-12b-it"),
        ("Gemma3:12b", "google/gemma-3-12b-it"),
        ("gemma 3 12b", "google/gemma-3-12b-it"),
        ("llama3.3-70b", "meta-llama/Llama-3.3-70B-Instruct"),
        ("qwen-2.5-7b", "Qwen/Qwen2.5-7B"),
        ("qwen2.5:7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen3-8b-instruct", "Qwen/Qwen3-8B"),
        ("qwen3-30b", "Qwen/Qwen3-30B-A3B"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("phi-3-mini", "microsoft/Phi-3-mini-4k-instruct"),
        ("phi3.5-mini", "microsoft/Phi-3.5-mini-instruct"),
        ("phi-1.5", "microsoft/phi-1_5"),
        ("olmo-2-7b", "allenai/OLMo-2-1124-7B"),
        ("olmo-7b", "allenai/OLMo-7B-hf"),
        ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0"),
    ],
)
def test_everyday_names_mean_one_shape_and_say_which(name, found):
    assert load_modelspec(name).id == found
    (note,) = name_notes(name)
    assert note.startswith(f"{name!r} was taken for {found};")


def test_exact_names_need_no_note():
    for name in ("qwen3-8b", "deepseek-r1-distill-llama-8b", "Qwen/Qwen3-8B", "./nowhere"):
        assert name_notes(name) == ()
    assert load_modelspec("deepseek-r1-distill-llama-8b").id.endswith("R1-Distill-Llama-8B")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mistral-7b", "mistralai/Mistral-7B-v0.1, mistralai/Mistral-7B-v0.3"),
        ("mistral-7b-instruct", "Mistral-7B-Instruct-v0.1, mistralai/Mistral-7B-Instruct-v0.3"),
    ],
)
def test_everyday_names_of_several_shapes_list_them(name, found):
    with pytest.raises(InputError, match=f"means several: .*{found}. Give the whole id.") as raised:
        load_modelspec(name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("mistral", "Mistral-7B-v0.1, mistralai/Mistral-7B-v0.3, mistralai/Mistral-Large"),
        ("smollm2", "SmolLM2-1.7B, HuggingFaceTB/SmolLM2-135M, HuggingFaceTB/SmolLM2-360M"),
        ("deepseek", "DeepSeek-V3"),  # which release is not said
        ("qwen", "and 11 more"),
    ],
)
def test_a_family_alone_lists_its_models(name, listed):
    with pytest.raises(InputError, match=f"unknown model.*The catalogue has .*{listed}"):
        load_modelspec(name)


@pytest.mark.parametrize(
    "name", ["qwen-7b", "llama-8b", "falcon-10b", "llama-3.1-8b-awq", "gemma-3-12", "-"]
)
def test_another_family_version_or_format_is_no_everyday_name(name):
    with pytest.raises(InputError, match="unknown model"):
        load_modelspec(name)


def test_a_name_opens_one_profile_only(monkeypatch):
    opened = []
    original = models.load_profile
    monkeypatch.setattr(models, "load_profile", lambda path: opened.append(path) or original(path))
    load_modelspec("Qwen/Qwen3-8B")
    assert len(opened) == 1


def test_every_profile_is_strict_and_matches_its_published_count():
    off = {}
    for path in data_files("models"):
        profile = load_profile(path)
        spec = load_modelspec(profile.id)
        head = spec.vocabulary_size * spec.hidden_size if spec.stored_untied else 0
        if profile.published and profile.published.parameters != spec.parameters + head:
            off[profile.id] = spec.parameters + head - profile.published.parameters
    # That list's count is 512 short of what transformers builds.
    assert off == {"google/gemma-2-2b": 512}


def test_unknown_names_suggest(monkeypatch):
    with pytest.raises(InputError, match=r"Did you mean.*Llama-2-7b-hf"):
        load_modelspec("llama-2-7b-hg")
    with pytest.raises(InputError, match="no such model folder"):
        load_modelspec("./nowhere/at-all")


def test_offline_hub_says_what_to_do(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(InputError, match=r"cannot be reached.*config\.json into a folder"):
        load_modelspec("someone/some-model")


def test_without_a_network_the_hub_is_asked_once_and_what_was_fetched_before_is_taken(
    monkeypatch, tmp_path
):
    hub = pytest.importorskip("huggingface_hub")
    httpx = pytest.importorskip("httpx")

    def no_route(*_, **__):
        raise httpx.ConnectError("name or service not known")

    monkeypatch.setattr(hub.HfApi, "model_info", no_route)
    monkeypatch.setattr(hub.HfApi, "get_safetensors_metadata", no_route)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked again"))
    with pytest.raises(InputError, match=r"cannot be reached.*config\.json into a folder"):
        load_modelspec("someone/some-model")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(load_modelspec("llama-3.2-1b").config))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(path))
    spec = load_modelspec("someone/some-model")
    assert (spec.id, spec.hidden_size) == ("someone/some-model", 2048)


def test_broken_profiles_are_named(tmp_path):
    path = tmp_path / "a--b.yaml"
    path.write_text("id: a/b\nconfg: {}\nsources: [x]\n")
    with pytest.raises(InputError, match=r"a--b\.yaml.*config|confg"):
        load_profile(path)
    path.write_text("id: [")
    with pytest.raises(InputError, match="cannot read"):
        load_profile(path)
