"""The verdict: which kernel of an engine runs a scheme on a device, and which rule decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.engines.matching import format_fits, platform_problem, static_reasons
from advisor.engines.releases import engine_name, holds, minor_before, named
from advisor.engines.rules import (
    EngineProfile,
    FormatRule,
    KernelRule,
    Platform,
    Support,
    load_engine,
)
from advisor.engines.shapes import (
    SPLITTING_ENGINES,
    ModuleVerdict,
    in_words,
    place_modules,
    refusal,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

_PLATFORM_OF_VENDOR: dict[str, Platform] = {
    "nvidia": "cuda", "amd": "rocm", "intel": "xpu", "apple": "metal",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rejection:
    """A kernel that was passed over, and every reason why."""

    kernel: str
    reasons: tuple[str, ...]
    source: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an engine runs a scheme on a device.

    Attributes:
        support: ``native``, ``weight-only``, ``emulated`` or ``none``.
        name: Kernel of most weights.
        reason: The rule that decided, in words.
        source: Where that rule was read.
        modules: Every module whose kernel is not ``name``; empty when all are alike.
        format: Checkpoint format, or None where the engine reads none of the scheme.
        compute: Arithmetic of the products: ``16-bit``, ``int8``, ``fp8`` or ``fp4``.
        dtype: 16-bit data type to serve with, where the kernel allows one only.
        speed: Key of the speed coefficients.
        rejected: Kernels passed over before ``name``, with their reasons.
        conflict: What documentation and code say differently, and which decided.
    """

    support: Support
    name: str | None
    reason: str
    source: str | None
    modules: tuple[ModuleVerdict, ...] = ()
    format: str | None = None
    compute: str = "16-bit"
    dtype: str | None = None
    speed: str = "default"
    rejected: tuple[Rejection, ...] = ()
    conflict: str | None = None
    experimental: bool = False

    @property
    def kept_16bit(self) -> tuple[str, ...]:
        """Modules that no kernel runs quantized; they stay as they are."""
        return tuple(module.name for module in self.modules if module.kernel is None)

    def to_dict(self) -> dict[str, Any]:
        """Return the ``kernel`` object of a candidate's JSON."""
        document: dict[str, Any] = {
            "support": self.support,
            "name": self.name,
            "reason": self.reason,
            "source": self.source,
        }
        if self.conflict:
            document["conflict"] = self.conflict
        if self.kept_16bit:
            document["kept_16bit"] = list(self.kept_16bit)
        return document


def platform_of(hardware: HardwareProfile) -> Platform:
    """Return the software platform of a device: ``cuda``, ``rocm``, ``xpu``, ``metal``, ``cpu``."""
    if hardware.kind == "cpu":
        return "cpu"
    return _PLATFORM_OF_VENDOR.get(hardware.vendor.lower(), "vulkan")


def format_for(engine: str, scheme: Scheme) -> str | None:
    """Return the checkpoint format in which an engine reads a scheme, or None."""
    profile = load_engine(engine)
    for rule in profile.formats:
        if holds(rule, profile.release) and format_fits(rule, scheme):
            return rule.format
    return None


def verdict(
    engine: str,
    scheme: Scheme,
    hardware: HardwareProfile,
    linears: Sequence[LinearSpec],
    *,
    checkpoint_format: str | None = None,
) -> Verdict:
    """Decide how ``engine`` runs ``scheme`` on ``hardware`` for these modules.

    Kernels are tried in the engine's own order; a module whose shape the first one refuses goes
    to the next, and to 16 bits when none is left.

    Args:
        engine: Name of the engine.
        scheme: Scheme of all modules.
        hardware: The device; of several, each gets a part of every matrix.
        linears: Quantizable modules of the model; empty = shapes are not judged.
        checkpoint_format: Format to judge instead of the engine's usual one for the scheme.

    Raises:
        InputError: Unknown engine.
    """
    profile = load_engine(engine)
    carried = checkpoint_format or format_for(engine, scheme)
    refused = _engine_refusal(profile, scheme, hardware, carried)
    if refused is not None:
        return refused
    platform = platform_of(hardware)
    fitting: list[KernelRule] = []
    rejected: list[Rejection] = []
    for rule in profile.kernels:
        if platform not in rule.platforms or scheme.weight not in rule.weights:
            continue
        reasons = static_reasons(rule, scheme, hardware, carried or "", profile.release)
        if reasons:
            rejected.append(Rejection(rule.name, tuple(reasons), profile.source(rule.source)))
        else:
            fitting.append(rule)
    if not fitting:
        return _no_kernel(profile, scheme, hardware, carried, rejected)
    if not linears or not scheme.is_quantized:
        return _describe(profile, fitting[0], carried, rejected, ())
    devices = devices_sharing(profile, hardware)
    return _with_shapes(profile, scheme, fitting, carried, rejected, linears, devices)


def devices_sharing(profile: EngineProfile, hardware: HardwareProfile) -> int:
    """Return over how many devices an engine splits every matrix."""
    return hardware.count if engine_name(profile.name) in SPLITTING_ENGINES else 1


def _engine_refusal(
    profile: EngineProfile, scheme: Scheme, hardware: HardwareProfile, carried: str | None
) -> Verdict | None:
    platform = platform_of(hardware)
    rule = profile.platforms.get(platform)
    if rule is None:
        starts_on = ", ".join(profile.platforms)
        reason = f"{profile.title} does not run on {hardware.name} ({platform}): {starts_on} only"
        return Verdict("none", None, reason, profile.source(next(iter(profile.sources))))
    if problem := platform_problem(rule, hardware):
        reason = f"{profile.title} needs {problem}, {hardware.name} is not that"
        return Verdict("none", None, reason, profile.source(rule.source))
    if carried is None:
        return _unread(profile, scheme)
    return None


def _unread(profile: EngineProfile, scheme: Scheme) -> Verdict:
    """Say why the engine reads no checkpoint of a scheme, and which release did."""
    source = profile.source(next(iter(profile.sources)))
    dropped = [
        rule for rule in profile.formats if format_fits(rule, scheme) and rule.until is not None
    ]
    if dropped and not profile.unsupported.get(scheme.method):
        rule = max(dropped, key=lambda rule: rule.until or "")
        if rule.source:
            source = profile.source(rule.source)
        return Verdict("none", None, f"{profile.label} {dropped_in_words(profile, rule)}", source)
    why = profile.unsupported.get(scheme.method, f"it reads no checkpoint of {scheme}")
    return Verdict("none", None, f"{profile.title}: {why}", source)


def dropped_in_words(profile: EngineProfile, rule: FormatRule) -> str:
    """Say that a format went with a release, and how to ask for the one before it."""
    until = rule.until or ""
    older = named(engine_name(profile.name), minor_before(until))
    moved = f" ({rule.moved})" if rule.moved else ""
    return (
        f"reads no {rule.format} checkpoint since release {until}{moved}: for an older server use "
        f"--engine {older}"
    )


def _no_kernel(
    profile: EngineProfile,
    scheme: Scheme,
    hardware: HardwareProfile,
    carried: str | None,
    rejected: Sequence[Rejection],
) -> Verdict:
    if rejected:
        # A kernel that fails on fewer points is nearer to what the user wanted: say it first.
        ordered = sorted(rejected, key=lambda r: len(r.reasons))
        listed = "; ".join(f"{r.kernel}: {', '.join(r.reasons)}" for r in ordered)
        reason = f"no kernel of {profile.title} runs {scheme} on {hardware.name} - {listed}"
        source = ordered[0].source
    else:
        kind = scheme.weight
        reason = f"{profile.title} has no kernel for {kind} weights on {platform_of(hardware)}"
        source = profile.source(next(iter(profile.sources)))
    return Verdict("none", None, reason, source, format=carried, rejected=tuple(rejected))


def _describe(
    profile: EngineProfile,
    rule: KernelRule,
    carried: str | None,
    rejected: Iterable[Rejection],
    modules: tuple[ModuleVerdict, ...],
    extra: str = "",
) -> Verdict:
    what = {
        "native": f"{rule.name} computes in {rule.compute}",
        "weight-only": f"{rule.name} keeps the weights packed and computes in {rule.compute}",
        "emulated": f"{rule.name} computes in 16 bits what is stored in fewer",
        "none": rule.name,
    }[rule.support]
    reason = what + (f" ({rule.note})" if rule.note else "") + extra
    conflict = None
    if rule.conflict:
        conflict = (
            f"documentation: {rule.conflict.documentation}; code: {rule.conflict.code}; "
            f"decided by the {rule.conflict.decided_by}"
        )
    return Verdict(
        support=rule.support,
        name=rule.name,
        reason=reason,
        source=profile.source(rule.source),
        modules=modules,
        format=carried,
        compute=rule.compute,
        dtype=rule.dtypes[0] if len(rule.dtypes) == 1 else None,
        speed=rule.speed,
        rejected=tuple(rejected),
        conflict=conflict,
        experimental=rule.experimental,
    )


def _with_shapes(
    profile: EngineProfile,
    scheme: Scheme,
    fitting: Sequence[KernelRule],
    carried: str | None,
    rejected: list[Rejection],
    linears: Sequence[LinearSpec],
    devices: int,
) -> Verdict:
    """Give every (fused) module the first kernel that takes its shape."""
    placed = place_modules(fitting, linears, fused=profile.fuses_modules, devices=devices)
    if reason := refusal(scheme, placed):
        source = profile.source(fitting[0].source)
        return Verdict("none", None, reason, source, format=carried, rejected=tuple(rejected))
    main = placed.main
    for rule, why in placed.passed:
        rejected.append(Rejection(rule.name, (why,), profile.source(rule.source)))
    return _describe(profile, main, carried, rejected, placed.others, in_words(placed.others))
