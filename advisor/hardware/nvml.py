"""NVIDIA GPUs as NVML describes them; each thing that fails becomes a sentence."""

from __future__ import annotations

import importlib
import logging
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

logger = logging.getLogger(__name__)

# nvmlReturn_t of nvml.h.
_NOT_SUPPORTED = 3
_NO_PERMISSION = 4
_NOT_FOUND = 6
_DRIVER_NOT_LOADED = 9
_LIBRARY_NOT_FOUND = 12
_FUNCTION_NOT_FOUND = 13
_GPU_IS_LOST = 15
_VERSION_MISMATCH = 18
_INIT_REASONS = {
    _NO_PERMISSION: "this user may not open the NVIDIA device files. Ask for access to "
    "/dev/nvidia*, or start the container with --gpus all",
    _DRIVER_NOT_LOADED: "the NVIDIA driver is installed but not loaded. Load it "
    "(sudo modprobe nvidia) or restart",
    _LIBRARY_NOT_FOUND: "no NVIDIA driver is installed (its library libnvidia-ml is missing). "
    "Install the driver, or in a container start it with --gpus all",
    _VERSION_MISMATCH: "the NVIDIA driver's library and kernel module have different versions. "
    "Restart the machine",
}


@dataclass(frozen=True, slots=True)
class MigInstance:
    """One MIG instance: a part of a GPU that programs see as a GPU.

    Attributes:
        name: As ``1g.10gb``, or None if NVML's name does not say.
        memory_bytes: Its memory.
        memory_free_bytes: What of it is free.
        compute_slices: Its slices of the GPU's seven.
        multiprocessors: Its streaming multiprocessors.
    """

    name: str | None
    memory_bytes: int | None
    memory_free_bytes: int | None
    compute_slices: int | None
    multiprocessors: int | None


@dataclass(frozen=True, slots=True)
class NvmlGpu:
    """One GPU as NVML describes it; None where NVML does not say.

    Attributes:
        index: NVML's number, in PCI order.
        name: NVML's name, as ``NVIDIA GeForce RTX 4090``.
        compute_capability: As ``8.9``.
        memory_bytes: Total.
        memory_free_bytes: Free now.
        sm_clock_mhz: Largest clock of the multiprocessors.
        memory_clock_mhz: Largest clock of the memory.
        power_limit_w: Power limit in force.
        mig_enabled: Whether MIG is on; None where the GPU has no MIG.
        instances: MIG instances.
        visible: Whether CUDA_VISIBLE_DEVICES lets programs see it.
    """

    index: int
    name: str | None
    compute_capability: str | None
    memory_bytes: int | None
    memory_free_bytes: int | None
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_limit_w: float | None
    mig_enabled: bool | None
    instances: tuple[MigInstance, ...]
    visible: bool


@dataclass(frozen=True, slots=True)
class NvmlReport:
    """Everything that NVML said.

    Attributes:
        driver_version: As ``550.54.15``.
        cuda_version: Largest CUDA version of the driver, as ``12.4``.
        gpus: Every GPU that answered.
        problems: A sentence for each thing that failed.
    """

    driver_version: str | None
    cuda_version: str | None
    gpus: tuple[NvmlGpu, ...]
    problems: tuple[str, ...]


class _Nvml:
    """pynvml with every error turned into a sentence of ``problems``."""

    def __init__(self, module: Any, problems: list[str]) -> None:
        self.module = module
        self.problems = problems

    def ask(self, what: str, function: str, *arguments: Any, optional: bool = False) -> Any:
        """Call a function of NVML; None if it fails.

        Args:
            what: What is asked for, for the sentence.
            function: Name in pynvml.
            arguments: Its arguments.
            optional: Many GPUs do not support it: that alone is no problem.
        """
        call: Callable[..., Any] | None = getattr(self.module, function, None)
        if call is None:
            if not optional:
                self.problems.append(
                    f"NVML did not tell {what}: this nvidia-ml-py lacks {function}. "
                    "Run `pip install --upgrade nvidia-ml-py`."
                )
            return None
        try:
            return call(*arguments)
        except self.module.NVMLError as error:
            code = getattr(error, "value", None)
            if not (optional and code in (_NOT_SUPPORTED, _NOT_FOUND, _FUNCTION_NOT_FOUND)):
                self.problems.append(f"NVML did not tell {what}: {_reason(error)}.")
            return None


def query_nvml(module: Any | None = None) -> NvmlReport:
    """Ask NVML for every GPU.

    Args:
        module: ``pynvml``; another object in tests. Imported by default.
    """
    problems: list[str] = []
    if module is None:
        try:
            module = importlib.import_module("pynvml")
        except ImportError as error:
            logger.debug("pynvml does not import: %s", error)
            sentence = (
                "NVIDIA GPUs cannot be detected: the Python package nvidia-ml-py is missing. "
                "Run `pip install nvidia-ml-py`, or name the GPU with --gpu."
            )
            return NvmlReport(None, None, (), (sentence,))
    with _initialised(module, problems) as ready:
        if not ready:
            return NvmlReport(None, None, (), tuple(problems))
        nvml = _Nvml(module, problems)
        driver = _text(nvml.ask("the driver version", "nvmlSystemGetDriverVersion"))
        cuda = nvml.ask("the CUDA version", "nvmlSystemGetCudaDriverVersion")
        count = nvml.ask("the number of GPUs", "nvmlDeviceGetCount")
        if count == 0:
            problems.append(
                f"The NVIDIA driver {driver or ''} runs but sees no GPU. Check that one is "
                "present (lspci), or name the GPU with --gpu.".replace("  ", " ")
            )
        found = [_gpu(nvml, index) for index in range(count or 0)]
        gpus = _mark_visible([gpu for gpu in found if gpu is not None], problems)
    version = None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}"
    return NvmlReport(driver, version, gpus, tuple(problems))


@contextmanager
def _initialised(module: Any, problems: list[str]) -> Iterator[bool]:
    try:
        module.nvmlInit()
    except module.NVMLError as error:
        known = _INIT_REASONS.get(getattr(error, "value", -1))
        problems.append(f"No NVIDIA GPU can be used: {known or _reason(error)}.")
        yield False
        return
    try:
        yield True
    finally:
        try:
            module.nvmlShutdown()
        except module.NVMLError as error:
            # The answers are in already: nothing of the result depends on it.
            logger.debug("NVML did not shut down: %s", error)


def _gpu(nvml: _Nvml, index: int) -> NvmlGpu | None:
    handle = nvml.ask(f"of GPU {index}", "nvmlDeviceGetHandleByIndex", index)
    if handle is None:
        return None
    of = f"of GPU {index}"
    capability = nvml.ask(
        f"the compute capability {of}", "nvmlDeviceGetCudaComputeCapability", handle
    )
    memory = nvml.ask(f"the memory {of}", "nvmlDeviceGetMemoryInfo", handle)
    power = nvml.ask(
        f"the power limit {of}", "nvmlDeviceGetEnforcedPowerLimit", handle, optional=True
    )
    mode = nvml.ask(f"the MIG mode {of}", "nvmlDeviceGetMigMode", handle, optional=True)
    enabled = None if mode is None else bool(mode[0])
    return NvmlGpu(
        index=index,
        name=_text(nvml.ask(f"the name {of}", "nvmlDeviceGetName", handle)),
        compute_capability=None if capability is None else f"{capability[0]}.{capability[1]}",
        memory_bytes=None if memory is None else int(memory.total),
        memory_free_bytes=None if memory is None else int(memory.free),
        sm_clock_mhz=_clock(nvml, handle, of, "NVML_CLOCK_SM", 1),
        memory_clock_mhz=_clock(nvml, handle, of, "NVML_CLOCK_MEM", 2),
        power_limit_w=None if power is None else power / 1000,
        mig_enabled=enabled,
        instances=_instances(nvml, handle, index) if enabled else (),
        visible=True,
    )


def _clock(nvml: _Nvml, handle: Any, of: str, name: str, code: int) -> int | None:
    clock = getattr(nvml.module, name, code)
    answer = nvml.ask(f"the clocks {of}", "nvmlDeviceGetMaxClockInfo", handle, clock, optional=True)
    return None if answer is None else int(answer)


def _instances(nvml: _Nvml, handle: Any, index: int) -> tuple[MigInstance, ...]:
    of = f"of GPU {index}"
    most = nvml.ask(f"the number of MIG instances {of}", "nvmlDeviceGetMaxMigDeviceCount", handle)
    found = []
    for number in range(most or 0):
        # Unused places answer "not found".
        part = nvml.ask(
            f"MIG instance {number} {of}",
            "nvmlDeviceGetMigDeviceHandleByIndex",
            handle,
            number,
            optional=True,
        )
        if part is not None:
            found.append(_instance(nvml, part, f"of MIG instance {number} {of}"))
    if not found:
        nvml.problems.append(
            f"GPU {index} is in MIG mode, but has no instance that this user may see: programs "
            f"cannot use it. Create one (sudo nvidia-smi mig -i {index} -cgi ... -C), or switch "
            f"MIG off (sudo nvidia-smi -i {index} -mig 0)."
        )
    return tuple(found)


def _instance(nvml: _Nvml, handle: Any, of: str) -> MigInstance:
    memory = nvml.ask(f"the memory {of}", "nvmlDeviceGetMemoryInfo", handle)
    shares = nvml.ask(f"the slices {of}", "nvmlDeviceGetAttributes", handle, optional=True)
    name = _text(nvml.ask(f"the name {of}", "nvmlDeviceGetName", handle, optional=True))
    profile = name.rpartition("MIG ")[2].strip() if name and "MIG " in name else None
    return MigInstance(
        name=profile,
        memory_bytes=None if memory is None else int(memory.total),
        memory_free_bytes=None if memory is None else int(memory.free),
        compute_slices=None if shares is None else int(shares.computeInstanceSliceCount),
        multiprocessors=None if shares is None else int(shares.multiprocessorCount),
    )


def _mark_visible(gpus: list[NvmlGpu], problems: list[str]) -> tuple[NvmlGpu, ...]:
    """Mark the GPUs that CUDA_VISIBLE_DEVICES hides; NVML itself shows all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None or not gpus:
        return tuple(gpus)
    words = [word.strip() for word in named.split(",")]
    if any(word and not word.lstrip("-").isdigit() for word in words):
        problems.append(
            f"CUDA_VISIBLE_DEVICES={named!r} names GPUs by UUID, which is not followed here: "
            "all GPUs are shown."
        )
        return tuple(gpus)
    chosen: set[int] = set()
    for word in words:
        if not word or int(word) not in {gpu.index for gpu in gpus}:
            # CUDA ignores everything from the first invalid number on.
            break
        chosen.add(int(word))
    hidden = [gpu.index for gpu in gpus if gpu.index not in chosen]
    if hidden:
        listed = ", ".join(map(str, hidden))
        problems.append(
            f"CUDA_VISIBLE_DEVICES={named!r} hides GPU {listed} from programs started here."
        )
    return tuple(replace(gpu, visible=gpu.index in chosen) for gpu in gpus)


def _text(value: str | bytes | None) -> str | None:
    # nvidia-ml-py before 11.515 answers in bytes.
    return value.decode() if isinstance(value, bytes) else value


def _reason(error: Exception) -> str:
    if getattr(error, "value", None) == _GPU_IS_LOST:
        return "the GPU has fallen off the bus; restart the machine"
    return str(error).rstrip(".") or type(error).__name__
