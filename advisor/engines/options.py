"""What an engine lets one checkpoint mix, and which engine suits a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines.rules import load_engine
from advisor.engines.verdict import platform_of, verdict
from advisor.errors import InputError
from advisor.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import LinearSpec


@dataclass(frozen=True, slots=True)
class MixtureOptions:
    """Per-module choices that one checkpoint may hold side by side.

    Attributes:
        format: Checkpoint format that carries them all.
        schemes: Schemes with a kernel on the device; ``bf16`` among them.
    """

    format: str
    schemes: tuple[Scheme, ...]


def mixture_options(
    engine: str, hardware: HardwareProfile, linears: Sequence[LinearSpec] = ()
) -> MixtureOptions:
    """Return the schemes that an engine runs side by side in one checkpoint on a device.

    Args:
        engine: Name of the engine.
        hardware: The device.
        linears: The model's modules; with them, schemes that no module fits are left out.

    Raises:
        InputError: The engine reads no mixtures on this platform.
    """
    profile = load_engine(engine)
    platform = platform_of(hardware)
    for mixture in profile.mixtures:
        if platform not in mixture.platforms:
            continue
        schemes = []
        for name in mixture.schemes:
            scheme = parse_scheme(name)
            carried = mixture.format if scheme.is_quantized else None
            found = verdict(engine, scheme, hardware, linears, checkpoint_format=carried)
            if found.support != "none":
                schemes.append(scheme)
        return MixtureOptions(mixture.format, tuple(schemes))
    raise InputError(
        f"{profile.title} reads no checkpoint of mixed bit widths on {hardware.name} ({platform}). "
        "Use --engine vllm or --engine transformers, or a uniform scheme."
    )


def fused_conflicts(
    engine: str, assignment: Mapping[str, Scheme], linears: Sequence[LinearSpec]
) -> tuple[str, ...]:
    """Return every fused product whose modules were given different schemes.

    Args:
        engine: Name of the engine.
        assignment: Module path to scheme; a module without one stays in 16 bits.
        linears: The model's modules.

    Returns:
        One sentence per product; empty where the engine fuses nothing or all agree.
    """
    if not load_engine(engine).fuses_modules:
        return ()
    groups: dict[str, dict[str, str]] = {}
    for linear in linears:
        name = str(assignment[linear.name]) if linear.name in assignment else "bf16"
        groups.setdefault(linear.fused_group, {})[linear.name] = name
    return tuple(
        f"{engine} runs {group} as one product: its modules must share a scheme, but got "
        + ", ".join(f"{module} {name}" for module, name in found.items())
        for group, found in groups.items()
        if len(set(found.values())) > 1
    )


def default_engine(hardware: HardwareProfile) -> str:
    """Return the engine that ``--engine auto`` stands for on a device.

    vLLM where its kernels run (NVIDIA from sm_75 on, AMD's CDNA), llama.cpp on older or
    other GPUs, transformers on CPUs, since it is what Advisor itself brings along.
    """
    platform = platform_of(hardware)
    if platform == "cpu":
        return "transformers"
    if platform == "cuda" and (hardware.sm or 0) >= 75:
        return "vllm"
    if platform == "rocm" and (hardware.isa or "").startswith("gfx9"):
        return "vllm"
    return "llama.cpp"
