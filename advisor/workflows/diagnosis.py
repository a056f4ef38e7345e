"""``doctor``: what works in this environment, why the rest does not, and what to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

from advisor.hardware.detect import Machine, detect

_LIBRARIES = (
    ("torch", "torch", "everything that touches weights"),
    ("transformers", "transformers", "loading models, evaluation"),
    ("safetensors", "safetensors", "reading and writing checkpoints"),
    ("optuna", "optuna", "the search"),
    ("bitsandbytes", "bitsandbytes", "NF4, FP4 and LLM.int8()"),
    ("compressed-tensors", "compressed_tensors", "loading our compressed-tensors files here"),
    ("nvidia-ml-py", "pynvml", "detecting NVIDIA GPUs"),
    ("huggingface-hub", "huggingface_hub", "downloading models that you name"),
    ("gptqmodel", "gptqmodel", "loading gptq and awq files in transformers"),
    ("lm-eval", "lm_eval", "--task with lm-evaluation-harness"),
    ("vllm", "vllm", "serving"),
)
_OPTIONAL = {
    "gptqmodel": "advisor backends install gptqmodel",
    "lm-eval": "pip install lm-eval",
    "vllm": "pip install vllm, on the machine that serves",
}


@dataclass(frozen=True, slots=True)
class Library:
    """One library.

    Attributes:
        name: Its name on the package index.
        version: What is installed, None if it is not.
        works: Whether it imports.
        purpose: What it is for.
        problem: Why it does not work, or an empty string.
        optional: Whether the journey works without it.
    """

    name: str
    version: str | None
    works: bool
    purpose: str
    problem: str
    optional: bool


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was found, and what to do about it."""

    libraries: tuple[Library, ...]
    machine: Machine
    next_steps: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor doctor --json``."""
        return {
            "schema_version": 1,
            "python": platform.python_version(),
            "platform": platform.platform(terse=True),
            "libraries": [asdict(library) for library in self.libraries],
            "machine": self.machine.to_dict(),
            "next_steps": list(self.next_steps),
        }


def doctor() -> Diagnosis:
    """Import every library, look for devices, and say what is missing."""
    libraries = tuple(_try(*entry) for entry in _LIBRARIES)
    machine = detect()
    steps = [
        f"{library.name}: {library.problem}. Install it: pip install {library.name}"
        for library in libraries
        if not library.works and not library.optional
    ]
    steps += [
        f"optional: {_OPTIONAL[library.name]} ({library.purpose})"
        for library in libraries
        if not library.works and library.optional
    ]
    if machine.gpus and not _torch_sees_gpu():
        steps.append(
            "torch does not see the GPU: this is a CPU build, or its CUDA is newer than the driver "
            f"(CUDA {machine.cuda_version or 'unknown'}). Install the one for it."
        )
    steps += _slow_devices()
    return Diagnosis(libraries, machine, tuple(steps))


def _try(name: str, module: str, purpose: str) -> Library:
    optional = name in _OPTIONAL
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Library(name, None, False, purpose, "not installed", optional)
    try:
        importlib.import_module(module)
    except Exception as error:  # a library may fail at import in any way; saying how is the point
        reason = (
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        )
        return Library(name, version, False, purpose, reason, optional)
    return Library(name, version, True, purpose, "", optional)


def _torch_sees_gpu() -> bool:
    torch = sys.modules.get("torch")
    return bool(torch is not None and torch.cuda.is_available())


def _slow_devices() -> list[str]:
    """Say which GPUs make codes by many small calls, and why."""
    if not _torch_sees_gpu():
        return []
    from advisor.methods.columns_in_turn import why_no_kernels
    from advisor.models.device import accelerators

    reasons = {device: why_no_kernels(device) for device in accelerators()}
    return [
        f"the search runs several times slower than it could on {device}: {reason}. Install "
        "Triton, which torch's builds for GPUs bring along, and a C compiler such as gcc."
        for device, reason in reasons.items()
        if reason
    ]
