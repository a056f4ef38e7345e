"""Coefficients of the speed model, as ``evidence/speed.yaml`` has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from advisor.engines.releases import engine_name
from advisor.engines.rules import read_yaml
from advisor.plan.data import data_folders

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class KernelSpeed:
    """Speed of one kernel on one engine; see the head of ``speed.yaml``."""

    efficiency: float
    layer_us: float
    utilization: float
    ramp: float = 0.0
    ramp_8bit: float | None = None
    batched_layer_us: float | None = None
    dequantizes: bool = False


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Speed of one engine: its fixed costs and its kernels."""

    step_us: float
    combine: str
    spread: float
    kernels: dict[str, KernelSpeed]
    parallel: str = "tensor"
    """``tensor``: devices share every product; ``layers``: they take turns."""
    cache_factor: float = 1.0
    """Times that a step moves the KV cache: transformers copies and repeats it."""
    generations: dict[int, float] | None = None
    """Compute capability -> factor on the fixed costs: low clocks make launches dear."""


def coefficients_of(engine: str) -> EngineSpeed:
    """Return an engine's coefficients; an engine without its own takes vLLM's."""
    folders = data_folders("evidence")
    table = load_coefficients(folders)
    return table.get(engine_name(engine), table["vllm"])


@lru_cache(maxsize=8)
def load_coefficients(folders: tuple[Path, ...]) -> dict[str, EngineSpeed]:
    """Read ``speed.yaml`` of these folders, the last one winning per engine."""
    document: dict[str, Any] = {}
    for folder in folders:
        path = folder / "speed.yaml"
        if path.is_file():
            document.update(read_yaml(path)["engines"])
    engines: dict[str, EngineSpeed] = {}
    for name, entry in document.items():
        if "like" not in entry:
            kernels = {key: KernelSpeed(**values) for key, values in entry["kernels"].items()}
            engines[name] = EngineSpeed(**{**entry, "kernels": kernels})
    for name, entry in document.items():
        if "like" in entry:
            base = engines[entry["like"]]
            changes = {key: value for key, value in entry.items() if key != "like"}
            engines[name] = replace(base, **changes)
    return engines
