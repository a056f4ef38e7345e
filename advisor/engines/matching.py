"""Whether a rule fits a scheme and a device, and every reason why not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.engines.releases import not_in

if TYPE_CHECKING:
    from advisor.engines.rules import FormatRule, KernelRule, PlatformRule
    from advisor.hardware.profile import HardwareProfile
    from advisor.schemes import Scheme


def platform_problem(rule: PlatformRule, hardware: HardwareProfile) -> str | None:
    """Return what an engine's platform rule misses on a device, or None."""
    sm = hardware.sm
    if rule.minimum_capability and sm is not None and sm < rule.minimum_capability:
        return f"sm_{rule.minimum_capability} or newer (this GPU is sm_{sm})"
    if rule.targets and hardware.isa and hardware.isa not in rule.targets:
        return f"one of {', '.join(rule.targets)} (this GPU is {hardware.isa})"
    if rule.instruction_sets and not set(rule.instruction_sets) & set(hardware.instruction_sets):
        return f"one of {', '.join(rule.instruction_sets)}"
    return None


def format_fits(rule: FormatRule, scheme: Scheme) -> bool:
    """Return whether a format rule carries the scheme."""
    return (
        (not rule.methods or scheme.method in rule.methods)
        and (not rule.weights or scheme.weight in rule.weights)
        and (not rule.granularities or scheme.granularity in rule.granularities)
        and (rule.symmetric is None or scheme.symmetric == rule.symmetric)
        and (not rule.group_sizes or scheme.group_size in rule.group_sizes)
        and not (
            rule.activation_order is False
            and scheme.activation_order
            and scheme.granularity == "group"
        )
        and (rule.activations is None or scheme.activation in rule.activations)
    )


def static_reasons(
    rule: KernelRule, scheme: Scheme, hardware: HardwareProfile, carried: str, release: str = ""
) -> list[str]:
    """Return why a kernel cannot run the scheme on the device, whatever the shapes."""
    reasons = _device_reasons(rule, hardware)
    if dated := not_in(rule, release):
        reasons.append(dated)
    if carried not in rule.formats:
        reasons.append(f"reads {' or '.join(rule.formats)}, not {carried}")
    if rule.methods and scheme.method not in rule.methods:
        reasons.append(f"is for {', '.join(rule.methods)}")
    if rule.granularities and scheme.granularity not in rule.granularities:
        reasons.append(f"scales per {' or '.join(rule.granularities)}, not {scheme.granularity}")
    size = scheme.group_size
    if rule.group_sizes and size is not None and size not in rule.group_sizes:
        sizes = ", ".join("channel" if s == -1 else str(s) for s in rule.group_sizes)
        reasons.append(f"group sizes {sizes}, not {'channel' if size == -1 else size}")
    if rule.group_multiple and size is not None and size > 0 and size % rule.group_multiple:
        reasons.append(f"group sizes that are multiples of {rule.group_multiple}, not {size}")
    if rule.symmetric is not None and scheme.symmetric is not None:
        if rule.symmetric != scheme.symmetric:
            reasons.append("symmetric grids only" if rule.symmetric else "asymmetric grids only")
    elif scheme.weight in rule.symmetric_weights and scheme.symmetric is False:
        reasons.append(f"no zero points for {scheme.weight}")
    if rule.activation_order is False and scheme.activation_order:
        reasons.append("no act-order")
    if scheme.activation not in rule.activations:
        kinds = ", ".join(a or "16-bit" for a in rule.activations)
        reasons.append(f"activations in {kinds}, not {scheme.activation or '16-bit'}")
    if rule.requires:
        reasons.append(f"needs the optional package {', '.join(rule.requires)}")
    return reasons


def _device_reasons(rule: KernelRule, hardware: HardwareProfile) -> list[str]:
    reasons = []
    sm = hardware.sm
    if sm is not None:
        if rule.capabilities and sm not in rule.capabilities:
            exact = ", ".join(f"sm_{c}" for c in rule.capabilities)
            reasons.append(f"needs exactly {exact}, this GPU is sm_{sm}")
        if rule.minimum_capability and sm < rule.minimum_capability:
            reasons.append(f"needs sm_{rule.minimum_capability}, this GPU is sm_{sm}")
        if rule.maximum_capability and sm > rule.maximum_capability:
            why = f" ({rule.above})" if rule.above else ""
            reasons.append(f"runs up to sm_{rule.maximum_capability}, this GPU is sm_{sm}{why}")
    if hardware.kind == "cpu" and rule.instruction_sets:
        if not set(rule.instruction_sets) & set(hardware.instruction_sets):
            reasons.append(f"needs one of {', '.join(rule.instruction_sets)}")
    elif rule.targets and hardware.isa and hardware.isa not in rule.targets:
        reasons.append(f"needs one of {', '.join(rule.targets)}, this GPU is {hardware.isa}")
    return reasons
