"""The real libraries: installed from their lock files, run on a small model, measured, verified.

``$ADVISOR_BACKENDS`` names a folder to keep their environments in; without it they live for the
session only.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from advisor.backends import registry
from advisor.backends.environments import check, install
from advisor.backends.registry import Backend, get_backend
from advisor.budgets import Budgets
from advisor.formats.read import read_checkpoint
from advisor.plan.files import load_plan
from advisor.plan.hashing import sha256_file
from advisor.predict.models import load_modelspec
from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme
from advisor.workflows.applying import PLAN_NAME, apply
from advisor.workflows.backend_runs import run_backend
from advisor.workflows.tuning import tune
from advisor.workflows.verifying import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the lock files are for Python 3.11"),
]
CASES = [
    ("gptqmodel", "gptq-int4-g64-sym", "gptq"),
    ("gptqmodel", "gptq-int4-g32-sym-actorder", "gptq"),
    ("gptqmodel", "gptq-int8-g64-asym", "gptq"),
    ("llmcompressor", "rtn-int4-g64-sym", "compressed-tensors"),
    ("llmcompressor", "gptq-int4-g64-sym", "compressed-tensors"),
    ("llmcompressor", "gptq-int4-g64-asym", "compressed-tensors"),
    ("llmcompressor", "gptq-int8-gch-sym", "compressed-tensors"),
    ("llmcompressor", "awq-int4-g64-asym", "compressed-tensors"),
    ("llmcompressor", "smoothquant-int8-gch-sym-aint8", "compressed-tensors"),
    ("llmcompressor", "rtn-fp8-gch-afp8", "compressed-tensors"),
    ("bitsandbytes", "bnb-nf4", "bitsandbytes"),
    ("bitsandbytes", "bnb-nf4-dq", "bitsandbytes"),
    ("bitsandbytes", "bnb-fp4", "bitsandbytes"),
    ("bitsandbytes", "llm.int8", "bitsandbytes"),
    ("hqq", "hqq-int4-g64-asym", "safetensors"),
    ("auto-round", "autoround-int4-g64-sym", "gptq"),
    ("auto-round", "autoround-int4-g64-asym", "gptq"),
]
QUICK = {"llmcompressor": ["n_grid=4"], "auto-round": ["iters=4", "batch_size=4", "lr=0.005"]}


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Return a function that installs a library once."""
    if "ADVISOR_BACKENDS" not in os.environ:
        os.environ["ADVISOR_BACKENDS"] = str(tmp_path_factory.mktemp("backends"))

    def get(name: str) -> None:
        status = install(get_backend(name))
        assert status.works, status.problem

    return get


@pytest.mark.parametrize(("name", "scheme", "stored"), CASES)
def test_it_makes_what_it_is_asked_for(
    installed, model_folder, tmp_path, monkeypatch, name, scheme, stored
):
    installed(name)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = run_backend(
        name,
        model_folder,
        scheme,
        tmp_path / "out",
        settings=QUICK.get(name, []),
        samples=8,
        sequence_length=64,
        evaluation_sequences=4,
        gpu="cpu",
        engine="transformers",
    )
    assert os.listdir(tmp_path / "here") == []
    found = run.to_dict()
    assert found["format"] == stored
    assert found["version"] == check(get_backend(name)).version
    assert 0 < found["kl"]["value"] < 5
    report = verify(tmp_path / "out" / PLAN_NAME, tmp_path / "out")
    assert report.passed, report.to_dict()


def test_auto_round_chooses_a_mixture(installed, model_folder, tmp_path):
    installed("auto-round")
    settings = [*QUICK["auto-round"], "target_bits=5.2", "options=int8-g64-sym,int2-g32-sym"]
    run = run_backend(
        "auto-round", model_folder, "autoround-int4-g32-sym", tmp_path / "out", settings=settings,
        samples=8, sequence_length=64, evaluation_sequences=4, gpu="cpu", engine="transformers",
    )  # fmt: skip
    schemes = run.plan.scheme.modules
    assert schemes
    assert set(schemes.values()) <= {"autoround-int8-g64-sym", "autoround-int2-g32-sym"}
    for part in ("self_attn.{}_proj", "mlp.{}_proj"):
        parts = "qkv" if "attn" in part else ("gate", "up")
        names = [f"model.layers.1.{part.format(one)}" for one in parts]
        assert len({schemes.get(name, "default") for name in names}) == 1
    assert 5.0 < run.plan.expected.bits_per_weight < 5.5
    report = verify(tmp_path / "out" / PLAN_NAME, tmp_path / "out")
    assert report.passed, report.to_dict()


@pytest.mark.parametrize("name", ["gptqmodel", "llmcompressor"])
def test_a_search_measures_it_and_applies_it_where_it_wins(
    installed, model_folder, tmp_path, monkeypatch, name
):
    installed(name)
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))

    def theirs(finalists, goal):
        return next(finalist for finalist in finalists if finalist.mixture.backend == name)

    monkeypatch.setattr("advisor.search.run.choose", theirs)
    path = tmp_path / "plan.yaml"
    tuning = tune(
        model_folder, gpu="rtx-4090", engine="vllm", context=128, output=path, backends=[name],
        budgets=Budgets.from_text(max_size="2.06MB"), trials=1, sequential=False, samples=8,
        sequence_length=64, evaluation_sequences=4,
    )  # fmt: skip
    document = tuning.to_dict()
    assert document["backends_failed"] == []
    makers = [row["backend"] for row in document["finalists"]]
    assert makers.count(name) == 1
    assert None in makers
    plan = load_plan(path)
    assert plan.backend is not None
    assert plan.backend.name == name
    assert plan.scheme.default == plan.backend.scheme
    applied = apply(path, tmp_path / "made")
    assert applied.size_bytes == plan.expected.size_bytes
    report = verify(path, tmp_path / "made")
    assert report.passed, report.to_dict()
    (made,) = (tmp_path / "plan.yaml.search" / "backends").glob(f"{name}-*/model.safetensors")
    assert sha256_file(made) == sha256_file(tmp_path / "made" / "model.safetensors")


def test_a_search_has_auto_round_mix_at_its_own_size(
    installed, model_folder, tmp_path, monkeypatch
):
    installed("auto-round")
    quick = get_backend("auto-round").settings | {"iters": 4, "batch_size": 4}
    monkeypatch.setitem(
        registry.BACKENDS, "auto-round", replace(get_backend("auto-round"), settings=quick)
    )

    def mixed(finalists, goal):
        made = [f for f in finalists if f.mixture.backend and not f.mixture.is_uniform]
        return made[0] if made else finalists[0]

    monkeypatch.setattr("advisor.search.run.choose", mixed)
    spec = load_modelspec(model_folder)
    sizes = [
        checkpoint_size(spec, parse_scheme(f"autoround-int{part}-sym"), "gptq").total_bytes
        for part in ("4-g32", "8-g128")
    ]
    limit = sizes[0] + (sizes[1] - sizes[0]) // 4
    path = tmp_path / "plan.yaml"
    tuning = tune(
        model_folder, gpu="rtx-4090", engine="vllm", context=128, output=path,
        backends=["auto-round"], budgets=Budgets(max_size_bytes=limit), trials=1, sequential=False,
        samples=8, sequence_length=64, evaluation_sequences=4,
    )  # fmt: skip
    document = tuning.to_dict()
    assert document["backends_failed"] == []
    assert [row["backend"] for row in document["finalists"]].count("auto-round") == 2
    plan = load_plan(path)
    assert plan.backend is not None
    assert plan.backend.settings["options"] == "int4-g128-sym,int8-g128-sym"
    assert len({plan.scheme.default, *plan.scheme.modules.values()}) > 1
    assert 0.97 * limit < plan.expected.size_bytes <= limit
    applied = apply(path, tmp_path / "made")
    assert applied.size_bytes == plan.expected.size_bytes
    report = verify(path, tmp_path / "made")
    assert report.passed, report.to_dict()


class _WithoutCuda(Backend):
    """A backend whose worker the CPU is passed off as a CUDA device to."""

    @property
    def worker(self) -> Path:
        return Path(__file__).with_name("cuda_free_worker.py")


@pytest.mark.parametrize(
    ("name", "scheme", "stored"),
    [
        ("auto-gptq", "gptq-int4-g64-sym", "gptq"),
        ("auto-gptq", "gptq-int4-g32-asym-actorder", "gptq"),
        ("autoawq", "awq-int4-g64-asym", "awq"),
    ],
)
def test_a_worker_for_cuda_does_its_work(
    installed, model_folder, tmp_path, monkeypatch, name, scheme, stored
):
    usual = get_backend(name)
    environment = install(usual)
    assert environment.version is not None
    values = {one.name: getattr(usual, one.name) for one in fields(usual)}
    backend = _WithoutCuda(**values | {"cuda_only": False})
    monkeypatch.setitem(registry.BACKENDS, name, backend)
    run = run_backend(
        name, model_folder, scheme, tmp_path / "out", samples=8, sequence_length=64,
        evaluation_sequences=4, gpu="cpu", engine="transformers",
    )  # fmt: skip
    found = run.to_dict()
    assert found["format"] == stored
    assert 0 < found["kl"]["value"] < 5
    assert set(read_checkpoint(tmp_path / "out").modules) == {
        linear.name for linear in load_modelspec(model_folder).linears
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "is_marlin_format" not in config.pop("quantization_config")
    own = json.loads((model_folder / "config.json").read_text())
    assert config == own | {"dtype": "float16" if name == "auto-gptq" else own["dtype"]}
    report = verify(tmp_path / "out" / PLAN_NAME, tmp_path / "out")
    assert report.passed, report.to_dict()


@pytest.mark.parametrize("name", ["auto-gptq", "autoawq"])
def test_a_library_for_cuda_installs_and_says_why_it_cannot_work(installed, name):
    status = install(get_backend(name))
    assert status.version is not None
    if not status.works:
        assert "CUDA" in status.problem
