"""``profile``: what this machine, or a named device, is and can run natively."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.hardware.detect import Machine
    from advisor.hardware.measure import Measurements
    from advisor.hardware.profile import HardwareProfile

_GPU_GATES = (
    "dp4a", "fp16_tensor_cores", "bf16", "int8_tensor_cores", "int4_tensor_cores", "fp8", "fp4",
)  # fmt: skip
_CPU_GATES = (
    "avx2", "avx512", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16",
    "neon", "neon_dotprod", "neon_i8mm",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """What was found.

    Attributes:
        devices: The named device, or every GPU of this machine and its CPU.
        machine: All that detection saw; None for a named device.
        measurements: Timed rates, where asked for.
    """

    devices: tuple[HardwareProfile, ...]
    machine: Machine | None = None
    measurements: Measurements | None = None

    @property
    def problems(self) -> tuple[str, ...]:
        """A sentence for each thing that is missing or failed."""
        return self.machine.problems if self.machine else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor profile --json``."""
        document: dict[str, Any] = {
            "schema_version": 1,
            "devices": [_device(profile, self.machine) for profile in self.devices],
            "problems": list(self.problems),
        }
        if self.machine is not None:
            document["machine"] = self.machine.to_dict()
        if self.measurements is not None:
            document["measured"] = self.measurements.to_dict()
        return document


def profile(gpu: str = "auto", *, measure: bool = False) -> ProfileReport:
    """Describe this machine (``auto``), its CPU (``cpu``), or a device of the catalogue.

    Args:
        gpu: A device as people name it, ``cpu`` or ``auto``.
        measure: Also time bandwidth and matrix products on the device at hand; what is not known
            otherwise is then kept for later advice on ``auto``.

    Raises:
        InputError: Unknown device, or ``measure`` with a device that is not in this machine.
    """
    name = gpu.strip().lower()
    if name not in ("auto", "cpu"):
        from advisor.errors import InputError
        from advisor.hardware.catalogue import find_profile

        if measure:
            raise InputError(
                f"--measure times the device at hand, but {gpu!r} was named. "
                "Leave --gpu out, or leave --measure out."
            )
        return ProfileReport((find_profile(gpu),))
    from advisor.hardware.detect import detect
    from advisor.hardware.kept import keep_measurements, with_kept
    from advisor.plan.folders import cache_root

    machine = detect()
    devices = (machine.cpu,) if name == "cpu" else (*machine.gpus, machine.cpu)
    measurements = None
    if measure:
        from advisor.hardware.measure import measure as measure_device

        on_gpu = bool(machine.gpus) and name == "auto"
        measurements = measure_device("cuda" if on_gpu else "cpu", devices[0])
        keep_measurements(measurements, cache_root())
    devices = tuple(with_kept(device, cache_root()) for device in devices)
    return ProfileReport(devices, machine, measurements)


def _device(profile: HardwareProfile, machine: Machine | None) -> dict[str, Any]:
    """One device: the profile, its facts in words, and the gates that its kind has."""
    gates = profile.capabilities.to_dict()
    names = _GPU_GATES if profile.kind == "gpu" else _CPU_GATES
    return profile.to_dict() | {
        "facts": [list(fact) for fact in _facts(profile, machine)],
        "capabilities": {gate: gates[gate] for gate in names},
    }


def _facts(profile: HardwareProfile, machine: Machine | None) -> list[tuple[str, str]]:
    facts = []
    if profile.count > 1:
        facts.append(("devices", str(profile.count)))
    if profile.compute_capability:
        facts.append(("compute capability", f"{profile.compute_capability} (sm_{profile.sm})"))
    if profile.memory_bytes:
        facts.append(("memory", f"{profile.memory_bytes / 2**30:.1f} GiB"))
    for label, name, unit in (
        ("bandwidth", "bandwidth_gb_s", "GB/s"),
        ("FP16", "fp16_tflops", "TFLOP/s dense"),
        ("BF16", "bf16_tflops", "TFLOP/s dense"),
        ("INT8", "int8_tops", "TOP/s dense"),
        ("FP8", "fp8_tflops", "TFLOP/s dense"),
        ("FP4", "fp4_tflops", "TFLOP/s dense"),
    ):
        figure = getattr(profile.figures, name)
        if figure is not None:
            facts.append((label, f"{figure.value:g} {unit} ({figure.grade})"))
    if machine is not None and profile.kind == "gpu":
        facts.append(("driver", machine.driver_version or "unknown"))
        facts.append(("CUDA", machine.cuda_version or "unknown"))
    if machine is not None and profile.kind == "cpu":
        facts.append(("cores", str(machine.cpu_facts.cores)))
    if profile.unknown:
        words = (re.sub("_(gb_s|gib|tflops|tops)$", "", name) for name in profile.unknown)
        facts.append(("not known", ", ".join(word.replace("_", " ") for word in words)))
    return facts
