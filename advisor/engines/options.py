"""What an engine lets one checkpoint mix, and which engine suits a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from advisor.engines.rules import load_engine
from advisor.engines.shapes import share_of
from advisor.engines.verdict import devices_sharing, platform_of, verdict
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
        unfit: Of a scheme, the modules that its groups do not divide or no kernel takes.
        ruled_out: Schemes that no or hardly any module fits, each with the rule that decided.
    """

    format: str
    schemes: tuple[Scheme, ...]
    unfit: Mapping[Scheme, frozenset[str]] = field(default_factory=dict)
    ruled_out: tuple[tuple[Scheme, str], ...] = ()


def mixture_options(
    engine: str, hardware: HardwareProfile, linears: Sequence[LinearSpec] = ()
) -> MixtureOptions:
    """Return the schemes that an engine runs side by side in one checkpoint on a device.

    Args:
        engine: Name of the engine.
        hardware: The device.
        linears: The model's modules; with them, schemes that no module fits are left out, and
            of the others the modules are named that they do not fit. A group size is judged on the
            modules that it divides: in a mixture the others take another scheme. Schemes whose
            inputs stay in 16 bits on the device are left out: without quantized inputs they are
            options of their own.

    Raises:
        InputError: The engine reads no mixtures on this platform.
    """
    profile = load_engine(engine)
    platform = platform_of(hardware)
    for mixture in profile.mixtures:
        if platform not in mixture.platforms:
            continue
        schemes: list[Scheme] = []
        unfit: dict[Scheme, frozenset[str]] = {}
        ruled_out: list[tuple[Scheme, str]] = []
        divided = _Divided(linears, devices_sharing(profile, hardware))
        for name in mixture.schemes:
            scheme = parse_scheme(name)
            carried = mixture.format if scheme.is_quantized else None
            fitting, others = divided.by(scheme)
            judged = fitting or linears  # where it divides none, the verdict says so
            found = verdict(engine, scheme, hardware, judged, checkpoint_format=carried)
            if found.support == "none":
                ruled_out.append((scheme, found.reason))
                continue
            if scheme.activation and found.support == "weight-only":
                kept = f"{found.name} leaves its inputs in 16 bits on {hardware.name}"
                ruled_out.append((scheme, kept))
                continue
            schemes.append(scheme)
            if names := others | set(found.kept_16bit):
                unfit[scheme] = frozenset(names)
        return MixtureOptions(mixture.format, tuple(schemes), unfit, tuple(ruled_out))
    raise InputError(
        f"{profile.title} reads no checkpoint of mixed bit widths on {hardware.name} ({platform}). "
        "Use --engine vllm or --engine transformers."
    )


class _Divided:
    """Modules by the group size that divides their inputs; equal sizes share a sequence."""

    def __init__(self, linears: Sequence[LinearSpec], devices: int) -> None:
        self._linears = linears
        self._inputs = [(share_of(m, devices) or (m.in_features, 0))[0] for m in linears]
        self._known: dict[int, tuple[Sequence[LinearSpec], frozenset[str]]] = {}

    def by(self, scheme: Scheme) -> tuple[Sequence[LinearSpec], frozenset[str]]:
        """Return the modules that a scheme's groups divide, and the names of the others."""
        size = (scheme.group_size or 1) if scheme.granularity == "group" else 1
        if size not in self._known:
            others = frozenset(
                linear.name
                for linear, inputs in zip(self._linears, self._inputs, strict=True)
                if inputs % size
            )
            fitting = self._linears
            if others:
                fitting = [linear for linear in fitting if linear.name not in others]
            self._known[size] = fitting, others
        return self._known[size]


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
