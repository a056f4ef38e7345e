"""What this machine is: its GPUs as NVML shows them, matched to the catalogue, and its CPU."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advisor.errors import InputError
from advisor.hardware.catalogue import load_profile
from advisor.hardware.cpu import CpuFacts, detect_cpu
from advisor.hardware.matching import match_device
from advisor.hardware.nvml import MigInstance, NvmlGpu, NvmlReport, query_nvml
from advisor.hardware.profile import Figure, Figures, HardwareProfile

_GIB = 2**30
_SLICES = 7
"""Compute slices of a GPU that MIG divides."""


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine.

    Attributes:
        gpus: A profile for each GPU, or MIG instance, that programs can use; the memory is what
            the driver reports.
        cpu: The CPU's profile; the memory is what this process may use.
        driver_version: NVIDIA's driver, as ``550.54.15``.
        cuda_version: Largest CUDA version of the driver, as ``12.4``.
        devices: Every GPU as NVML shows it, with clocks, free memory and MIG instances.
        cpu_facts: The CPU as the operating system shows it, with cores and free memory.
        problems: A sentence for each thing that is missing or failed.
    """

    gpus: tuple[HardwareProfile, ...]
    cpu: HardwareProfile
    driver_version: str | None
    cuda_version: str | None
    devices: tuple[NvmlGpu, ...]
    cpu_facts: CpuFacts
    problems: tuple[str, ...]

    @property
    def hardware(self) -> HardwareProfile:
        """What advice is for unless the user names another: the GPU of most memory, or the CPU."""
        if not self.gpus:
            return self.cpu
        return max(self.gpus, key=lambda gpu: gpu.memory_bytes or 0)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        cpu = asdict(self.cpu_facts)
        del cpu["problems"], cpu["instruction_sets"]
        return {
            "gpus": [gpu.to_dict() for gpu in self.gpus],
            "cpu": self.cpu.to_dict() | {"cores": cpu.pop("cores"), "system": cpu},
            "driver_version": self.driver_version,
            "cuda_version": self.cuda_version,
            "devices": [asdict(device) for device in self.devices],
            "problems": list(self.problems),
        }


def detect(nvml: Any | None = None, *, root: Path = Path("/")) -> Machine:
    """Find out what this machine is; nothing that fails is an error, it is a problem in words.

    Args:
        nvml: ``pynvml``, or an object like it in tests; imported by default.
        root: Where ``proc`` and ``sys`` lie; another folder in tests.
    """
    report: NvmlReport = query_nvml(nvml)
    cpu = detect_cpu(root)
    problems = [*report.problems, *cpu.problems]
    gpus: list[HardwareProfile] = []
    for device in report.gpus:
        if not device.visible:
            continue
        profile = gpu_profile(device, problems)
        if device.mig_enabled:
            gpus += [_instance_profile(profile, part, device) for part in device.instances]
        else:
            gpus.append(profile)
    if not report.gpus and (root / "dev/kfd").exists():
        problems.append(
            "An AMD GPU seems present (/dev/kfd), but only NVIDIA GPUs are detected. "
            "Name it with --gpu, for example --gpu mi300x."
        )
    return Machine(
        gpus=tuple(gpus),
        cpu=cpu_profile(cpu),
        driver_version=report.driver_version,
        cuda_version=report.cuda_version,
        devices=report.gpus,
        cpu_facts=cpu,
        problems=tuple(problems),
    )


def gpu_profile(device: NvmlGpu, problems: list[str]) -> HardwareProfile:
    """Return the catalogue's profile of a GPU with the memory that NVML reports.

    A GPU that the catalogue lacks gets a profile of what NVML says; its other figures are unknown.

    Args:
        device: The GPU.
        problems: A sentence is added for each thing that is not known.
    """
    profile = _from_catalogue(device, problems)
    if profile is None:
        name = device.name or f"NVIDIA GPU {device.index}"
        profile = HardwareProfile(
            id=_slug(name),
            name=name,
            vendor="NVIDIA",
            kind="gpu",
            compute_capability=device.compute_capability,
            notes=("Not in the catalogue: made from what the driver says.",),
        )
        problems.append(
            f"GPU {device.index} ({name}) is not in the catalogue: its bandwidth and rates are not "
            "known, so speed cannot be predicted. Run `advisor profile --measure`, or add "
            f"{profile.id}.yaml to a folder of $ADVISOR_PROFILES."
        )
    if device.memory_bytes is None:
        return profile
    memory = Figure(value=device.memory_bytes / _GIB, grade="reported", source="NVML")
    return _with_figures(profile, usable_memory_gib=memory)


def _from_catalogue(device: NvmlGpu, problems: list[str]) -> HardwareProfile | None:
    if device.name is None:
        return None
    memory = None if device.memory_bytes is None else device.memory_bytes / _GIB
    try:
        entry = match_device(device.name, memory)
        profile = None if entry is None else load_profile(entry.path)
    except InputError as error:
        # A broken profile of the user's must not hide the GPU.
        problems.append(str(error))
        return None
    if profile is None or device.compute_capability in (None, profile.compute_capability):
        return profile
    problems.append(
        f"GPU {device.index} ({device.name}) reports compute capability "
        f"{device.compute_capability}, but the profile {profile.id} says "
        f"{profile.compute_capability}: the profile is not used."
    )
    return None


def _instance_profile(
    whole: HardwareProfile, part: MigInstance, device: NvmlGpu
) -> HardwareProfile:
    """Return the profile of a MIG instance: its share of the GPU's memory, bandwidth and rates."""
    figures: dict[str, Figure | None] = {}
    shares = {"bandwidth_gb_s": _share(part.memory_bytes, device.memory_bytes)}
    compute = None if part.compute_slices is None else part.compute_slices / _SLICES
    for name in type(whole.figures).model_fields:
        figure: Figure | None = getattr(whole.figures, name)
        share = shares.get(name, compute)
        if name.endswith("memory_gib") or figure is None or share is None or name == "tdp_w":
            figures[name] = None
            continue
        source = f"{share:.3f} of the whole GPU's {figure.value:g} ({figure.source})"
        figures[name] = Figure(value=figure.value * share, grade="derived", source=source)
    if part.memory_bytes is not None:
        figures["usable_memory_gib"] = Figure(
            value=part.memory_bytes / _GIB, grade="reported", source="NVML"
        )
    suffix = part.name or "instance"
    return whole.model_copy(
        update={
            "id": f"{whole.id}-mig-{_slug(suffix)}",
            "name": f"{whole.name} MIG {suffix}",
            "figures": Figures(**figures),
            "aliases": (),
            "notes": (*whole.notes, "A MIG instance: rates are its share of the whole GPU."),
        }
    )


def cpu_profile(facts: CpuFacts) -> HardwareProfile:
    """Return the profile of a CPU: what the system says; bandwidth is unknown until measured."""
    figures = Figures()
    if facts.memory_bytes is not None:
        memory = Figure(value=facts.memory_bytes / _GIB, grade="reported", source="system")
        figures = Figures(memory_gib=memory)
    return HardwareProfile(
        id="cpu",
        name=facts.name,
        vendor=facts.vendor,
        kind="cpu",
        architecture=facts.machine or None,
        instruction_sets=facts.instruction_sets,
        figures=figures,
    )


def _share(part: int | None, whole: int | None) -> float | None:
    return None if part is None or not whole else part / whole


def _with_figures(profile: HardwareProfile, **changed: Figure) -> HardwareProfile:
    figures = profile.figures.model_copy(update=changed)
    return profile.model_copy(update={"figures": figures})


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "gpu"
