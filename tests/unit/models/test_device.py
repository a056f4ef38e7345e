"""Which device a command computes on, and what is said where it cannot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.errors import AdvisorError, InputError
from advisor.models import device as devices
from advisor.models.device import (
    check_device,
    choose_device,
    computing,
    keep_to_own_cores,
    place,
    repeatable,
)

GB = 10**9


@pytest.fixture
def two(monkeypatch):
    """Two accelerators: the first with 2 of 8 GB free, the second with 6."""
    free = {"cuda:0": 2 * GB, "cuda:1": 6 * GB}
    monkeypatch.setattr(devices, "accelerators", lambda: [torch.device(name) for name in free])
    monkeypatch.setattr(devices, "device_memory", lambda found: (free[str(found)], 8 * GB))
    monkeypatch.setattr(
        devices, "device_name", lambda found: "CPU" if found.type == "cpu" else "Card"
    )
    return free


@pytest.fixture
def none(monkeypatch):
    monkeypatch.setattr(devices, "accelerators", list)


def test_auto_takes_the_accelerator_of_most_room(two):
    found = choose_device("auto", 5 * GB)
    assert (str(found.device), found.name, found.reason) == ("cuda:1", "Card", "")
    two["cuda:0"] = 7 * GB
    assert str(choose_device("AUTO ", 5 * GB).device) == "cuda:0"


def test_auto_takes_the_cpu_where_no_room_is_left_and_says_why(two):
    found = choose_device("auto", 7 * GB)
    assert found.device.type == "cpu"
    assert found.reason == (
        "about 7.0 GB are needed on cuda:1 (Card), which has 6.0 of 8.0 GB free"
    )


def test_auto_without_any_is_the_cpu(none):
    assert choose_device("auto", 5 * GB).device.type == "cpu"
    assert choose_device("auto", 5 * GB).reason == ""


def test_a_named_device_is_taken_or_refused(two):
    assert str(choose_device("cuda", GB).device) == "cuda:0"
    assert str(choose_device("cuda:1", GB).device) == "cuda:1"
    assert choose_device("cpu", 99 * GB).device.type == "cpu"
    with pytest.raises(InputError, match=r"3\.0 GB are needed on cuda:0 .* 2\.0 of 8\.0 GB free"):
        choose_device("cuda", 3 * GB)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cuda:7", r"got 'cuda:7': here are cuda:0, cuda:1\."),
        ("gpu", r"got 'gpu': here are cuda:0, cuda:1\."),
        ("cud", r"Did you mean 'cuda'"),
        ("mps", r"mps computes nothing in float64.* Use --device cpu"),
        ("", r"must be auto, cpu, or an accelerator"),
    ],
)
def test_unknown_devices_are_named_with_what_is_there(two, name, words):
    with pytest.raises(InputError, match=words):
        check_device(name)


def test_an_accelerator_that_is_not_there_is_refused(none):
    with pytest.raises(InputError, match="got 'cuda': torch sees no accelerator here"):
        check_device("cuda")


def test_full_memory_is_one_line_with_the_next_step(two):
    full = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 8 GiB."
    with (
        pytest.raises(AdvisorError, match=r"memory of cuda:0 \(Card\) is full.*--device cpu") as e,
        computing(torch.device("cuda:0")),
    ):
        raise torch.OutOfMemoryError(full)
    assert str(e.value).endswith("finished work is kept. torch says: CUDA out of memory.")
    assert "\n" not in str(e.value)


def test_settings_of_torch_are_put_back(two, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_float32_matmul_precision("high")
    with computing(torch.device("cuda:0")), repeatable(torch.device("cuda:0")):
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.get_float32_matmul_precision() == "high"
    assert not torch.are_deterministic_algorithms_enabled()
    torch.set_float32_matmul_precision("highest")
    with computing(torch.device("cpu")), repeatable(torch.device("cpu")):
        assert not torch.are_deterministic_algorithms_enabled()


def test_a_model_that_computes_on_the_cpu_is_left_as_it_is():
    model = torch.nn.Linear(2, 2)
    place(model, torch.device("cpu"))
    assert not model._forward_pre_hooks


@pytest.fixture
def threads(monkeypatch):
    """Thread numbers as torch is told them; eight before, and none in the environment."""
    given = [8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: given[-1])
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return given


@pytest.mark.parametrize(("cores", "expected"), [(3.5, 3), (0.5, 1), (8, 8), (64, 8)])
def test_no_more_threads_than_cores_of_this_process(cores, expected, threads, monkeypatch):
    facts = replace(devices.detect_cpu(), cores=cores)
    monkeypatch.setattr(devices, "detect_cpu", lambda: facts)
    keep_to_own_cores()
    assert threads[-1] == expected


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_number_of_threads_that_a_user_set_stands(name, threads, monkeypatch):
    monkeypatch.setenv(name, "8")
    monkeypatch.setattr(devices, "detect_cpu", lambda: pytest.fail("nobody asked"))
    keep_to_own_cores()
    assert threads == [8]
