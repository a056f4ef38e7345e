"""A backend without a library: a worker that obeys the protocol, run by this interpreter."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from advisor.backends import registry
from advisor.backends.environments import environment_of
from advisor.backends.registry import Backend, Makes

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class FakeBackend(Backend):
    """A backend whose worker and lock file are the test's."""

    lock: Path = HERE / "lock"

    @property
    def requirements(self) -> Path:
        return self.lock

    @property
    def worker(self) -> Path:
        return HERE / "fake_worker.py"


@pytest.fixture
def fake_backend(tmp_path, monkeypatch):
    """Return a function that registers and installs a backend called ``fake``."""
    monkeypatch.setenv("ADVISOR_BACKENDS", str(tmp_path / "environments"))
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))
    lock = tmp_path / "fake.txt"
    lock.write_text("#: torch==2.13.0\n")

    def make(needs_text=True, **settings) -> FakeBackend:
        backend = FakeBackend(
            "fake",
            "fake",
            (Makes("gptq", "gptq", ("int4",), needs_text=needs_text),),
            "nothing",
            {"act": "succeed", "prepared": "", "prepared_mixture": ""} | settings,
            lock=lock,
        )
        monkeypatch.setitem(registry.BACKENDS, "fake", backend)
        folder = environment_of(backend)
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "python").symlink_to(sys.executable)
        marker = folder / "advisor-backend.json"
        marker.write_text(json.dumps({"name": "fake", "version": "9.9"}))
        return backend

    return make


@pytest.fixture
def prepared(random_llama_folder, tmp_path):
    """Return a function that rounds the tiny model: what the fake library then hands over."""
    import torch

    from advisor.formats.export import write_checkpoint
    from advisor.methods.registry import quantize
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.checkpoint import read_tensor, tensor_names
    from advisor.schemes import parse_scheme

    def make(
        scheme: str, others: dict[str, str] | None = None, model: Path = random_llama_folder
    ) -> Path:
        def chosen(name: str) -> str:
            named = (other for part, other in (others or {}).items() if part in name)
            return next(named, scheme)

        weights = {
            name.removesuffix(".weight"): quantize(
                read_tensor(model, name).to(torch.float32),
                None,
                parse_scheme(chosen(name)),
                QuantizationSettings(),
            )
            for name in tensor_names(model)
            if name.endswith("_proj.weight")
        }
        folder = tmp_path / f"prepared-{scheme}{'-mixed' if others else ''}"
        write_checkpoint(model, folder, format="gptq", weights=weights)
        return folder

    return make
