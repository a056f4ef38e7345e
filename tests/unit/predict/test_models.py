"""Names resolve as people type them, offline, without parsing the whole catalogue."""

from __future__ import annotations

import json

import pytest

from advisor.errors import InputError
from advisor.plan.data import data_files
from advisor.predict import models
from advisor.predict.models import load_modelspec, load_profile


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("META-LLAMA/llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("llama-3.1-8b-instruct", "meta-llama/Meta-Llama-3.1-8B"),
        ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_names_in_any_case_and_by_alias(name, found):
    assert load_modelspec(name).id == found


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
