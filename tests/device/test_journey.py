"""The journey on an accelerator, simulated: tune, apply and verify compute there and agree."""

from __future__ import annotations

import pytest
import torch
from simulated_device import SimulatedDevice

from advisor import workflows
from advisor.budgets import Budgets
from advisor.errors import AdvisorError
from advisor.models import device as devices
from advisor.predict.models import load_modelspec
from advisor.search.memory import needed_on_device

SETTINGS = {
    "gpu": "cpu", "engine": "vllm", "context": 64, "samples": 8, "sequence_length": 32,
    "evaluation_sequences": 4, "trials": 2, "budgets": Budgets(max_size_bytes=130_000),
}  # fmt: skip


@pytest.fixture
def machine(monkeypatch):
    """Let this machine have an accelerator with room for anything."""
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device("cuda:0")])
    monkeypatch.setattr(devices, "device_memory", lambda _: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(
        devices, "device_name", lambda d: "CPU" if d.type == "cpu" else "Simulated 80GB"
    )


def run(model, folder, patch, device):
    patch.setenv("ADVISOR_CACHE", str(folder / "cache"))
    tuned = workflows.tune(model, output=folder / "plan.yaml", device=device, **SETTINGS)
    applied = workflows.apply(folder / "plan.yaml", folder / "quantized", device=device)
    return tuned, applied


def test_tune_apply_and_verify_compute_there(machine, random_llama_folder, tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    expected, _ = run(random_llama_folder, here, monkeypatch, "cpu")
    with SimulatedDevice() as device:
        tuned, applied = run(random_llama_folder, there, monkeypatch, "auto")
        searched = device.operations
        verified = workflows.verify(there / "plan.yaml", there / "quantized", device="cuda")
        compared = workflows.compare(
            random_llama_folder, there / "quantized", evaluation_sequences=4, sequence_length=32
        )
    assert searched > 10_000
    assert device.operations > searched
    where = {"device": "cuda:0", "name": "Simulated 80GB", "threads": None, "reason": None}
    documents = (found.to_dict() for found in (tuned, applied, verified, compared))
    assert [document["computed_on"] for document in documents] == [where] * 4
    plan, other = tuned.result.plan, expected.result.plan
    assert plan.scheme == other.scheme
    assert plan.expected.kl.value == pytest.approx(other.expected.kl.value, rel=0.02)
    assert plan.computed_on.device == "cuda:0"
    assert other.computed_on.device == "cpu"
    assert verified.passed
    assert applied.warnings == ()
    assert compared.kl.value == pytest.approx(plan.expected.kl.value, rel=1.0)
    need = needed_on_device(load_modelspec(random_llama_folder), length=32, sequences=8)
    assert device.peak < need

    elsewhere = workflows.verify(there / "plan.yaml", there / "quantized", device="cpu")
    assert elsewhere.passed
    assert "the plan was on Simulated 80GB (cuda:0)" in elsewhere.warnings[0]


def test_full_memory_ends_the_search_with_what_to_do(
    machine, random_llama_folder, tmp_path, monkeypatch
):
    with (
        SimulatedDevice(capacity=400_000),
        pytest.raises(AdvisorError, match=r"memory of cuda:0 .* is full\. .* --device cpu"),
    ):
        run(random_llama_folder, tmp_path, monkeypatch, "cuda")


def test_without_room_on_the_accelerator_the_cpu_searches(
    machine, random_llama_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(devices, "device_memory", lambda _: (10**8, 10**9))
    with SimulatedDevice() as device:
        tuned = workflows.tune(
            random_llama_folder, output=tmp_path / "plan.yaml",
            **SETTINGS | {"trials": 1, "sequential": False},
        )  # fmt: skip
    assert device.operations == 0
    where = tuned.to_dict()["computed_on"]
    assert where["device"] == "cpu"
    assert where["reason"].startswith("about 1.3 GB are needed on cuda:0 (Simulated 80GB)")


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
                **options,
            )  # fmt: skip
        assert seen.value.args == (expected,)
