"""Where a model computes: on the CPU, or on an accelerator that torch sees.

An accelerator gets one part of a model at a time (:mod:`advisor.models.casting`), statistics and
weights of one input group, and the sums of the block that is collected; files and everything that
goes into them stay on the host. So what it needs depends on the largest block, not on the model.

On an accelerator products are of float32 as they are (no TF32), and sums that come from a backward
pass are made in one order, where torch has an algorithm for that: the same device, driver and
versions give the same codes. Other devices add in another order, as other numbers of threads do.
"""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from advisor.errors import AdvisorError, InputError, did_you_mean
from advisor.hardware.cpu import detect_cpu, whole_cores

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

CPU = torch.device("cpu")
AUTO = "auto"
_NO_FLOAT64 = ("mps",)
"""Kinds of devices that cannot compute in float64, as factors of second moments are."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""With it, products of one process come out the same each time; read when the device is first
used."""


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """Where to compute, and why there.

    Attributes:
        device: With its number, but for the CPU.
        name: As its maker calls it; ``CPU`` for that.
        reason: Why an accelerator that is there was left alone; empty otherwise.
    """

    device: torch.device
    name: str
    reason: str = ""


def accelerators() -> list[torch.device]:
    """Return the accelerators that torch sees: NVIDIA's, and AMD's in its builds for ROCm."""
    if not torch.cuda.is_available():
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return the bytes that are free on an accelerator, and those that it has."""
    free, total = torch.cuda.mem_get_info(device)
    # What this process has taken before and does not use is as good as free.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused, total


def device_name(device: torch.device) -> str:
    """Return what an accelerator is called."""
    return "CPU" if device.type == "cpu" else str(torch.cuda.get_device_name(device))


def check_device(wanted: str) -> str:
    """Return the name of a device that is here, ``auto`` or ``cpu``.

    Raises:
        InputError: There is no such device here, or it cannot compute what is needed.
    """
    name = wanted.strip().lower()
    here = [str(device) for device in accelerators()]
    kinds = list(dict.fromkeys(found.partition(":")[0] for found in here))
    if name in (AUTO, "cpu", *here):
        return name
    if name in kinds:
        return f"{name}:0"
    if name.partition(":")[0] in _NO_FLOAT64:
        raise InputError(
            f"--device {wanted} computes nothing in float64, which the search needs. "
            "Use --device cpu."
        )
    seen = f"here are {', '.join(here)}" if here else "torch sees no accelerator here"
    known = [known for known in (AUTO, *kinds, *here) if known != name]
    raise InputError(
        "--device must be auto, cpu, or an accelerator of this machine such as cuda or cuda:1, "
        f"but got {wanted!r}: {seen}.{did_you_mean(name, known)}"
    )


def choose_device(wanted: str, needed_bytes: int = 0) -> ComputeDevice:
    """Return where to compute.

    Args:
        wanted: ``cpu``, an accelerator, or ``auto``: the accelerator with most memory free, where
            that is enough, else the CPU.
        needed_bytes: Memory that an accelerator must have free.

    Raises:
        InputError: There is no such device here, or too little memory is free on it.
    """
    name = check_device(wanted)
    found = accelerators()
    if name == "cpu" or not found:
        return ComputeDevice(CPU, device_name(CPU))
    memory = {device: device_memory(device) for device in found}
    chosen = torch.device(name) if name != AUTO else max(found, key=lambda d: memory[d][0])
    free, total = memory[chosen]
    if free >= needed_bytes:
        return ComputeDevice(chosen, device_name(chosen))
    lack = (
        f"about {needed_bytes / 1e9:.1f} GB are needed on {chosen} ({device_name(chosen)}), which "
        f"has {free / 1e9:.1f} of {total / 1e9:.1f} GB free"
    )
    if name == AUTO:
        return ComputeDevice(CPU, device_name(CPU), lack)
    raise InputError(
        f"{lack}. Use --device cpu, end what else runs there, or use shorter sequences."
    )


def keep_to_own_cores() -> None:
    """Have torch start no more threads than this process may use cores.

    It starts one for each core of the machine. In a container that may use a few of them (Docker's
    ``--cpus``, a limit of Kubernetes) most of these would wait for each other. A number in
    ``OMP_NUM_THREADS`` or ``MKL_NUM_THREADS`` stands.
    """
    if any(os.environ.get(name) for name in _THREADS):
        return
    cores = whole_cores(detect_cpu().cores)
    if torch.get_num_threads() > cores:
        torch.set_num_threads(cores)


@contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Compute on a device, in float32 as it is.

    Raises:
        AdvisorError: The device's memory is full.
    """
    if device.type == "cpu":
        yield
        return
    os.environ.setdefault(*_WORKSPACE)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AdvisorError(
            f"the memory of {device} ({device_name(device)}) is full. Run the command again with "
            "--device cpu, with a shorter --sequence-length, or when nothing else runs there; "
            f"finished work is kept. torch says: {_first_sentence(error)}"
        ) from error
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Add in one order on a device, where torch can.

    For passes with gradients: attention's fused kernels for float32 add those of keys as they come,
    so that it is made of single products here, and so are sums by index. Not for the loops that
    choose codes: there every order is the same already, and torch would take slower ways to store
    by index.
    """
    if device.type == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        settings.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.filterwarnings("ignore", message=".*(deterministic|no current CUDA context)")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = before[2]


def place(model: nn.Module, device: torch.device) -> None:
    """Prepare a model to compute on a device that its parameters will not lie on.

    Buffers (rotary frequencies and the like) are small and go there for good. A call of the whole
    model takes its inputs to the device, and its logits back to where the inputs were.
    """
    if device.type == "cpu":
        return
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = value.to(device)
    came_from: list[torch.device] = []

    def arrive(_module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tensors = [value for value in (*given, *named.values()) if _is_tensor(value)]
        came_from.append(tensors[0].device if tensors else device)
        return (
            tuple(_moved(value, device) for value in given),
            {name: _moved(value, device) for name, value in named.items()},
        )

    def leave(_module: nn.Module, _given: Any, output: Any) -> Any:
        origin = came_from.pop()
        if _is_tensor(getattr(output, "logits", None)):
            output.logits = output.logits.to(origin)
        return output

    model.register_forward_pre_hook(arrive, with_kwargs=True)
    model.register_forward_hook(leave)


def indexed(device: torch.device | str) -> torch.device:
    """Return a device with its number: the first, where none is given."""
    found = torch.device(device)
    return found if found.type == "cpu" or found.index is not None else torch.device(found.type, 0)


def release_cached(device: torch.device) -> None:
    """Let other processes have what this one took of a device's memory and does not use."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _moved(value: Any, device: torch.device) -> Any:
    tensor: Tensor | Any = value
    return tensor.to(device) if _is_tensor(value) else value


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".") + "."
