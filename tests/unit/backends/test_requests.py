from __future__ import annotations

import pytest

from advisor.backends import requests
from advisor.backends.registry import BACKENDS, get_backend
from advisor.backends.requests import check_request, parse_settings, rule_of
from advisor.errors import BackendError, InputError
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme


@pytest.fixture
def linears(random_llama_folder):
    return load_modelspec(random_llama_folder).linears


@pytest.mark.parametrize(
    ("backend", "scheme"),
    [
        ("gptqmodel", "gptq-int4-g64-sym"),
        ("gptqmodel", "gptq-int8-gch-asym"),
        ("gptqmodel", "gptq-int4-g32-sym-actorder"),
        ("llmcompressor", "gptq-int4-g32-asym"),
        ("llmcompressor", "gptq-int8-gch-sym-aint8"),
        ("llmcompressor", "awq-int4-g64-asym"),
        ("llmcompressor", "smoothquant-int8-gch-sym-aint8"),
        ("llmcompressor", "rtn-fp8-gch-afp8"),
        ("bitsandbytes", "bnb-nf4-dq"),
        ("bitsandbytes", "bnb-fp4"),
        ("bitsandbytes", "llm.int8"),
        ("hqq", "hqq-int4-g64-asym"),
        ("auto-round", "autoround-int4-g64-sym"),
        ("auto-gptq", "gptq-int4-g64-sym-actorder"),
        ("autoawq", "awq-int4-g64-asym"),
    ],
)
def test_what_each_library_makes(backend, scheme):
    assert rule_of(get_backend(backend), parse_scheme(scheme)).method in scheme


@pytest.mark.parametrize(
    ("backend", "scheme", "said"),
    [
        ("gptqmodel", "bnb-nf4", "gptqmodel makes gptq, awq, but bnb-nf4 was asked for"),
        ("gptqmodel", "gptq-int5-g64-sym", "int2 or int3 or int4 or int8, but int5"),
        ("llmcompressor", "gptq-int4-g64-sym-actorder", "act-order must be False"),
        ("hqq", "hqq-int4-g64-sym", "symmetric must be False, but True"),
        ("autoawq", "awq-int4-gch-asym", "what a scale covers must be group"),
    ],
)
def test_what_a_library_does_not_make_is_said(backend, scheme, said):
    with pytest.raises(InputError) as error:
        rule_of(get_backend(backend), parse_scheme(scheme))
    assert said in str(error.value)


def test_all_that_is_wrong_is_listed_at_once(linears):
    with pytest.raises(InputError) as error:
        check_request(
            get_backend("gptqmodel"),
            parse_scheme("gptq-int5-g48-sym"),
            linears,
            {"damp_percnt": 0.1, "mse": "much"},
            "auto",
        )
    text = str(error.value)
    assert text.startswith("4 problems")
    assert "int5" in text
    assert "group_size=48" in text
    assert "Did you mean 'damp_percent'" in text
    assert "mse must be of type float, but got 'much'" in text


def test_settings_take_the_type_of_the_librarys_own():
    backend = get_backend("gptqmodel")
    found = parse_settings(backend, ["damp_percent=0.1", "act_group_aware=False"])
    assert found == {"damp_percent": 0.1, "act_group_aware": False}
    with pytest.raises(InputError, match="2 problems"):
        parse_settings(backend, ["damp_percent=lots", "mse"])


@pytest.mark.parametrize("name", ["auto-gptq", "autoawq"])
def test_cuda_only_is_said_before_any_work(linears, monkeypatch, name):
    monkeypatch.setattr(requests, "detect", lambda: type("Machine", (), {"gpus": ()})())
    backend = get_backend(name)
    scheme = parse_scheme(f"{backend.methods[0]}-int4-g64-asym")
    with pytest.raises(BackendError, match="on CUDA devices only, and this machine has none"):
        check_request(backend, scheme, linears, {}, "auto")


def test_awq_of_gptqmodel_needs_cuda_and_its_gptq_does_not(linears, monkeypatch):
    gpu = type("Gpu", (), {"vendor": "NVIDIA"})()
    monkeypatch.setattr(requests, "detect", lambda: type("Machine", (), {"gpus": (gpu,)})())
    backend, awq = get_backend("gptqmodel"), parse_scheme("awq-int4-g64-asym")
    check_request(backend, awq, linears, {}, "auto")
    check_request(backend, parse_scheme("gptq-int4-g64-sym"), linears, {}, "cpu")
    with pytest.raises(BackendError, match="the CPU was asked for"):
        check_request(backend, awq, linears, {}, "cpu")


def test_every_backend_has_its_lock_and_its_worker():
    for backend in BACKENDS.values():
        assert backend.requirements.is_file(), backend.name
        assert backend.worker.is_file(), backend.name
