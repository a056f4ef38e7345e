"""Detection against recorded answers of NVML."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from advisor.hardware.detect import detect

EXPECTED = {
    # record: (profile, compute capability, DP4A, INT8 tensor, INT4 tensor, BF16, FP8, FP4)
    "p100": ("p100-pcie-16", "6.0", False, False, False, False, False, False),
    "p40": ("p40", "6.1", True, False, False, False, False, False),
    "v100": ("v100-sxm2-32", "7.0", True, False, False, False, False, False),
    "t4": ("t4", "7.5", True, True, True, False, False, False),
    "a100": ("a100-sxm-80", "8.0", True, True, True, True, False, False),
    "rtx3090": ("rtx3090", "8.6", True, True, True, True, False, False),
    "rtx4090": ("rtx4090", "8.9", True, True, True, True, True, False),
    "h100": ("h100-sxm", "9.0", True, True, False, True, True, False),
    "b200": ("b200", "10.0", True, True, False, True, True, True),
    "b300": ("b300", "10.3", True, True, False, True, True, True),
    "rtx5090": ("rtx5090", "12.0", True, True, False, True, True, True),
}


@pytest.mark.parametrize("record", EXPECTED)
def test_recorded_gpu_is_its_profile_with_the_drivers_memory(nvml, record):
    fake = nvml(record)
    machine = detect(fake)
    (gpu,) = machine.gpus
    able = gpu.capabilities
    assert (
        gpu.id, gpu.compute_capability, able.dp4a, able.int8_tensor_cores,
        able.int4_tensor_cores, able.bf16, able.fp8, able.fp4,
    ) == EXPECTED[record]  # fmt: skip
    # What the driver leaves counts, not the nominal capacity.
    assert gpu.memory_bytes == fake.cards[0].memory_mib * 2**20
    assert gpu.figures.usable_memory_gib.grade == "reported"
    assert machine.driver_version == "570.124.06"
    assert machine.cuda_version == "12.8"
    (device,) = machine.devices
    assert device.sm_clock_mhz == fake.cards[0].sm_clock
    assert device.memory_clock_mhz == fake.cards[0].memory_clock
    assert device.memory_bytes - device.memory_free_bytes == 500 * 2**20
    assert machine.problems == machine.cpu_facts.problems
    assert fake.calls[-1] == "nvmlShutdown"
    json.dumps(machine.to_dict())


def test_two_gpus_are_two_profiles_and_the_larger_is_what_advice_is_for(nvml):
    machine = detect(nvml("rtx3090", "a100"))
    assert [gpu.id for gpu in machine.gpus] == ["rtx3090", "a100-sxm-80"]
    assert machine.hardware.id == "a100-sxm-80"
    assert [device.index for device in machine.devices] == [0, 1]


def test_mig_instances_are_the_devices_with_their_share(nvml):
    machine = detect(nvml("mig"))
    assert [gpu.id for gpu in machine.gpus] == [
        "a100-sxm-40-mig-3g.20gb",
        "a100-sxm-40-mig-1g.5gb",
    ]
    large, small = machine.gpus
    assert small.memory_bytes == 4864 * 2**20
    # 4864 of 40960 MiB is an eighth less a little; one of seven slices.
    assert small.bandwidth_gb_s == pytest.approx(1555 * 4864 / 40960)
    assert small.bf16_tflops == pytest.approx(312 / 7)
    assert large.int8_tops == pytest.approx(624 * 3 / 7)
    assert small.figures.bf16_tflops.grade == "derived"
    assert small.tdp_w is None
    assert small.capabilities.int8_tensor_cores
    assert [part.multiprocessors for part in machine.devices[0].instances] == [42, 14]
    assert machine.devices[0].mig_enabled


def test_mig_mode_without_instances_says_that_programs_cannot_use_the_gpu(nvml, card):
    machine = detect(nvml(card("NVIDIA A100-SXM4-40GB", (8, 0), 40960, mig=(1, 1))))
    assert machine.gpus == ()
    assert "is in MIG mode, but has no instance" in machine.problems[0]
    assert machine.hardware.kind == "cpu"


def test_gpu_without_mig_is_no_problem(nvml):
    machine = detect(nvml("rtx4090"))
    assert machine.devices[0].mig_enabled is None


@pytest.mark.parametrize(
    ("name", "capability", "memory_mib"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 16376),
        ("NVIDIA GeForce RTX 4090 D", (8, 9), 24564),
        ("NVIDIA GeForce RTX 4090", (8, 9), 49140),  # refitted with 48 GB
        ("NVIDIA GeForce RTX 3060", (8, 6), 8192),
        ("NVIDIA GeForce RTX 3080", (8, 6), 12288),
        ("NVIDIA H100 NVL", (9, 0), 95830),
        ("NVIDIA L40", (8, 9), 46068),
        ("Tesla V100-SXM2-16GB", (7, 0), 16160),
        ("Tesla P100-SXM2-16GB", (6, 0), 16280),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 97887),
        ("NVIDIA GeForce RTX 4090", (9, 9), 24564),  # the generation contradicts the profile
    ],
)
def test_gpu_that_only_looks_like_one_of_the_catalogue_gets_no_figures(
    nvml, card, name, capability, memory_mib
):
    machine = detect(nvml(card(name, capability, memory_mib)))
    (gpu,) = machine.gpus
    assert gpu.name == name
    assert gpu.bandwidth_gb_s is None
    assert gpu.memory_bytes == memory_mib * 2**20
    assert gpu.compute_capability == f"{capability[0]}.{capability[1]}"
    assert {"bandwidth_gb_s", "fp16_tflops"} <= set(gpu.unknown)
    assert any("is not in the catalogue" in problem for problem in machine.problems)


def test_memory_decides_between_cards_of_one_nvml_name(nvml, card):
    machine = detect(nvml(card("NVIDIA GeForce RTX 3060", (8, 6), 12288)))
    assert machine.gpus[0].id == "rtx3060-12"


def test_unified_memory_falls_back_to_the_catalogue_and_says_so(nvml):
    machine = detect(nvml("gb10"))
    (gpu,) = machine.gpus
    assert gpu.id == "gb10"
    assert gpu.memory_bytes == round(113.2 * 2**30)
    assert "NVML did not tell the memory of GPU 0: Not Supported." in machine.problems


def test_old_bindings_answer_in_bytes(nvml, card):
    machine = detect(nvml(card(b"Tesla T4", (7, 5), 15360), driver=b"450.80.02"))
    assert machine.gpus[0].id == "t4"
    assert machine.driver_version == "450.80.02"


REQUIRED = [
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetCudaDriverVersion",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetName",
    "nvmlDeviceGetCudaComputeCapability",
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetMaxClockInfo",
    "nvmlDeviceGetEnforcedPowerLimit",
    "nvmlDeviceGetMigMode",
]


@pytest.mark.parametrize("function", REQUIRED)
def test_each_call_that_fails_is_one_clear_sentence(nvml, function):
    machine = detect(nvml("a100", **{function: 999}))
    found = [problem for problem in machine.problems if problem.startswith("NVML did not tell")]
    assert found
    assert all(problem.endswith("Unknown Error.") for problem in found)
    lost = function in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    assert len(machine.gpus) == (0 if lost else 1)
    if function == "nvmlDeviceGetMemoryInfo":
        assert machine.gpus[0].memory_bytes == 80 * 2**30


@pytest.mark.parametrize(
    "function",
    ["nvmlDeviceGetMaxMigDeviceCount", "nvmlDeviceGetMigDeviceHandleByIndex",
     "nvmlDeviceGetAttributes"],
)  # fmt: skip
def test_each_mig_call_that_fails_is_a_sentence(nvml, function):
    machine = detect(nvml("mig", **{function: 4}))
    assert any("Insufficient Permissions" in problem for problem in machine.problems)


def test_second_gpu_is_found_when_the_first_is_lost(nvml):
    fake = nvml("a100", "rtx4090")
    original = type(fake).nvmlDeviceGetHandleByIndex

    class Lost(type(fake)):
        def nvmlDeviceGetHandleByIndex(self, index):
            if index == 0:
                raise self.NVMLError(15)
            return original(self, index)

    machine = detect(Lost(fake.cards, {}))
    assert [gpu.id for gpu in machine.gpus] == ["rtx4090"]
    assert "fallen off the bus" in machine.problems[0]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (12, "no NVIDIA driver is installed"),
        (9, "installed but not loaded"),
        (4, "may not open the NVIDIA device files"),
        (18, "different versions"),
        (999, "Unknown Error"),
    ],
)
def test_nvml_that_does_not_start_says_why_and_what_to_do(nvml, code, words):
    machine = detect(nvml(nvmlInit=code))
    assert machine.gpus == ()
    assert len(machine.problems) == 1 + len(machine.cpu_facts.problems)
    assert words in machine.problems[0]
    assert machine.hardware is machine.cpu


def test_driver_without_a_gpu_says_so(nvml):
    machine = detect(nvml())
    assert machine.gpus == ()
    assert "570.124.06 runs but sees no GPU" in machine.problems[0]


def test_shutdown_that_fails_loses_nothing(nvml):
    assert len(detect(nvml("t4", nvmlShutdown=999)).gpus) == 1


def test_missing_package_is_a_sentence(monkeypatch):
    original = importlib.import_module

    def refuse(name, *arguments):
        if name == "pynvml":
            raise ImportError("No module named 'pynvml'")
        return original(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", refuse)
    machine = detect()
    assert "pip install nvidia-ml-py" in machine.problems[0]


def test_function_that_the_bindings_lack_is_a_sentence(nvml):
    fake = nvml("t4")

    class Old:
        def __getattr__(self, name):
            if name == "nvmlSystemGetCudaDriverVersion":
                raise AttributeError(name)
            return getattr(fake, name)

    machine = detect(Old())
    assert machine.cuda_version is None
    assert "pip install --upgrade nvidia-ml-py" in machine.problems[0]


@pytest.mark.parametrize(
    ("value", "seen"), [("1", ["rtx4090"]), ("0,1", ["t4", "rtx4090"]), ("", []), ("-1", []),
                        ("0,7,1", ["t4"]), ("GPU-5c1", ["t4", "rtx4090"])],
)  # fmt: skip
def test_cuda_visible_devices_hides_gpus(nvml, monkeypatch, value, seen):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    machine = detect(nvml("t4", "rtx4090"))
    assert [gpu.id for gpu in machine.gpus] == seen
    assert len(machine.devices) == 2
    complete = value == "0,1"
    assert any("CUDA_VISIBLE_DEVICES" in text for text in machine.problems) is not complete


def test_amd_gpu_is_mentioned(nvml, linux):
    root = linux(dev__kfd="", proc__cpuinfo="flags : avx2\n", proc__meminfo="MemTotal: 1 kB\n")
    machine = detect(nvml(nvmlInit=12), root=root)
    assert any("--gpu mi300x" in problem for problem in machine.problems)


def test_broken_profile_of_the_users_does_not_hide_the_gpu(nvml, tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("kind: gpu\nid: mine\nname: [\n")
    monkeypatch.setenv("ADVISOR_PROFILES", str(tmp_path))
    machine = detect(nvml("t4"))
    assert machine.gpus[0].name == "Tesla T4"
    assert any("mine.yaml" in problem for problem in machine.problems)


def test_detection_imports_no_torch(nvml):
    code = (
        "import sys\nfrom advisor.hardware.detect import detect\ndetect()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
