"""The journey on an accelerator, simulated: tune, apply and verify compute there and agree."""

from __future__ import annotations

import pytest
import torch
from simulated_device import SimulatedDevice

from advisor import workflows
from advisor.budgets import Budgets
from advisor.models import device as devices
from advisor.search import planning

SETTINGS = {
    "gpu": "cpu", "engine": "vllm", "context": 64, "samples": 8, "sequence_length": 32,
    "evaluation_sequences": 4, "trials": 4,
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """Let this machine have an accelerator with room for anything."""
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("cuda:0")])
    monkeypatch.setattr(devices, "device_memory", lambda _: (80 * 10**9, 80 * 10**9))
    for users in (devices, planning):
        monkeypatch.setattr(users, "device_name", _name)
    monkeypatch.setattr(devices, "release_cached", lambda _: None)


def _name(device):
    return "CPU" if device.type == "cpu" else "Simulated 80GB"


def run(model, folder, cache, patch, device, **changes):
    patch.setenv("ADVISOR_CACHE", str(cache))
    options = SETTINGS | changes
    tuned = workflows.tune(model, output=folder / "plan.yaml", device=device, **options)
    applied = workflows.apply(folder / "plan.yaml", folder / "quantized", device=device)
    verified = workflows.verify(folder / "plan.yaml", folder / "quantized", device=device)
    return tuned, applied, verified


def test_tune_apply_and_verify_compute_there(machine, random_llama_folder, tmp_path, monkeypatch):
    budgets = {"budgets": Budgets(max_size_bytes=120_000)}
    here = run(
        random_llama_folder, tmp_path / "here", tmp_path / "cache", monkeypatch, "cpu", **budgets
    )
    with SimulatedDevice() as device:
        there = run(
            random_llama_folder, tmp_path / "there", tmp_path / "cache2", monkeypatch, "auto",
            **budgets,
        )  # fmt: skip
    assert device.operations > 10_000
    print(device.operations, device.peak, there[0].result.plan.scheme)
    assert there[0].to_dict()["computed_on"] == {
        "device": "cuda:0", "name": "Simulated 80GB", "threads": None, "reason": None,
    }  # fmt: skip
    assert there[0].result.plan.scheme == here[0].result.plan.scheme
    assert there[2].passed


class _Seen(Exception):
    pass


def test_an_accelerator_calibrates_on_more_text(
    machine, random_llama_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "cache"))

    def search(*_, calibration, **__):
        raise _Seen(calibration.sequences)

    monkeypatch.setattr("advisor.search.tune.tune", search)
    options = {name: value for name, value in SETTINGS.items() if name != "samples"}
    for device, given, expected in (
        ("cpu", None, 32), ("auto", None, 128), ("auto", 40, 40), ("cpu", 40, 40),
    ):  # fmt: skip
        with SimulatedDevice(), pytest.raises(_Seen) as seen:
            workflows.tune(
                random_llama_folder, output=tmp_path / "plan.yaml", device=device, samples=given,
                budgets=Budgets(max_size_bytes=120_000), **options,
            )  # fmt: skip
        assert seen.value.args == (expected,)
