"""What loaders demand of a planned checkpoint, one function each; the rules say who demands it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines import fused_conflicts, load_engine
from advisor.engines.releases import holds
from advisor.engines.shapes import is_row_parallel, share_of
from advisor.engines.verdict import dropped_in_words
from advisor.formats.base import list_some
from advisor.formats.layouts import expert_scheme_fits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class PlannedCheckpoint:
    """A checkpoint as it is planned, to be judged by the rules of one engine.

    Attributes:
        engine: Name of the engine.
        format: Name of the format.
        schemes: Scheme of each quantized module, as the format's readers find it.
        linears: Every quantizable linear of the model.
        heads: Attention heads; None where unknown.
        devices: Devices that share every layer (tensor parallelism).
    """

    engine: str
    format: str
    schemes: Mapping[str, Scheme]
    linears: Sequence[LinearSpec]
    heads: int | None = None
    devices: int = 1

    @property
    def quantized(self) -> list[LinearSpec]:
        """The linears that are stored in fewer than 16 bits."""
        return [linear for linear in self.linears if linear.name in self.schemes]


def reads_format(checkpoint: PlannedCheckpoint) -> list[str]:
    """The engine reads the format."""
    profile = load_engine(checkpoint.engine)
    known = {rule.format for rule in profile.formats if holds(rule, profile.release)}
    if checkpoint.format in known:
        return []
    for rule in profile.formats:
        if rule.format == checkpoint.format and rule.until is not None:
            return [f"it {dropped_in_words(profile, rule)}"]
    return [f"it reads {', '.join(sorted(known))}, not {checkpoint.format}"]


def fused_share(checkpoint: PlannedCheckpoint) -> list[str]:
    """Modules that run as one product share a scheme."""
    return list(fused_conflicts(checkpoint.engine, checkpoint.schemes, checkpoint.linears))


def one_setting(checkpoint: PlannedCheckpoint) -> list[str]:
    """The loader has one setting for every linear."""
    settings: dict[str, list[str]] = {}
    for linear in checkpoint.linears:
        scheme = checkpoint.schemes.get(linear.name)
        settings.setdefault("16-bit" if scheme is None else str(scheme), []).append(linear.name)
    if len(settings) < 2:
        return []
    seen = "; ".join(f"{key} for {list_some(names)}" for key, names in sorted(settings.items()))
    return [
        f"it reads one setting for every linear of a {checkpoint.format} checkpoint, but got "
        f"{seen}. Use format compressed-tensors"
    ]


def one_scheme_of_experts(checkpoint: PlannedCheckpoint) -> list[str]:
    """All experts of all layers are unpacked by one scheme, which is symmetric and weight-only."""
    experts = [linear.name for linear in checkpoint.linears if linear.is_expert]
    if not experts or not checkpoint.schemes:
        return []
    found: dict[str, list[str]] = {}
    for name in experts:
        scheme = checkpoint.schemes.get(name)
        found.setdefault("16-bit" if scheme is None else str(scheme), []).append(name)
    unfit = [
        name
        for name in experts
        if (scheme := checkpoint.schemes.get(name)) is None or not expert_scheme_fits(scheme)
    ]
    if len(found) == 1 and not unfit:
        return []
    seen = "; ".join(f"{key} for {list_some(names)}" for key, names in sorted(found.items()))
    return [
        "it unpacks the experts of all layers by one symmetric weight-only scheme, but got "
        f"{seen}. Give all experts one such scheme, or use --engine vllm"
    ]


def narrow_weights_under_8_bit_inputs(checkpoint: PlannedCheckpoint) -> list[str]:
    """Dense layers have no scheme for int4 under quantized inputs."""
    return _say(
        checkpoint,
        lambda scheme, _: scheme.is_integer and scheme.bits < 8 and scheme.activation is not None,
        "its dense layers know no integers of under 8 bits beneath quantized inputs",
    )


def blocks_of_all(checkpoint: PlannedCheckpoint) -> list[str]:
    """The size of FP8 blocks is read from the group of all linears, which must be the only one."""
    uneven = len(set(checkpoint.schemes.values())) > 1
    uneven |= len(checkpoint.quantized) < len(checkpoint.linears)
    return _say(
        checkpoint,
        lambda scheme, _: uneven and scheme.granularity == "block",
        "it finds the size of FP8 blocks where all linears share one scheme",
    )


def scales_per_token(checkpoint: PlannedCheckpoint) -> list[str]:
    """Inputs of FP8 weights find their scales at run time."""
    return _say(
        checkpoint,
        lambda scheme, _: scheme.static_activation,
        "it reads FP8 weights per channel with inputs rounded per token, not calibrated scales",
    )


def one_config_group(checkpoint: PlannedCheckpoint) -> list[str]:
    """All quantized modules share a config group: releases before 2026 read the first one alone."""
    found = sorted({str(scheme) for scheme in checkpoint.schemes.values()})
    if len(found) < 2:
        return []
    return [f"only its newest sources read more than one config group, but got {', '.join(found)}"]


def packed_bits(bits: tuple[int, ...]) -> Callable[[PlannedCheckpoint], list[str]]:
    """Return a check: packed integers have one of these widths."""

    def check(checkpoint: PlannedCheckpoint) -> list[str]:
        return _say(
            checkpoint,
            lambda scheme, _: (
                scheme.is_integer and scheme.activation is None and int(scheme.bits) not in bits
            ),
            f"its packed integers have {' or '.join(map(str, bits))} bits",
        )

    return check


def no_zero_points(checkpoint: PlannedCheckpoint) -> list[str]:
    """Packed integers are symmetric."""
    return _say(
        checkpoint,
        lambda scheme, _: scheme.is_integer and scheme.symmetric is False,
        "packed integers must be symmetric: use symmetric schemes, or serve with transformers 5.22",
    )


def gptq_types(checkpoint: PlannedCheckpoint) -> list[str]:
    """Two integer types are known."""
    return _say(
        checkpoint,
        lambda scheme, _: scheme.weight not in ("int4", "int8") or not scheme.symmetric,
        "it reads symmetric int4 and int8 of a gptq checkpoint; use format compressed-tensors",
    )


def ordered_groups(checkpoint: PlannedCheckpoint) -> list[str]:
    """Groups of scattered inputs are not read any more."""
    return _say(
        checkpoint,
        lambda scheme, _: scheme.activation_order,
        "it reads no act-order groups; use compressed-tensors with static groups, or drop "
        "-actorder",
    )


def whole_groups(checkpoint: PlannedCheckpoint) -> list[str]:
    """Groups and words may not be cut by the devices that share a layer."""

    def cut(scheme: Scheme, linear: LinearSpec) -> bool:
        size = scheme.group_size or -1
        part = share_of(linear, checkpoint.devices)
        if part is None:
            return True
        inputs, outputs = part
        if scheme.granularity in ("group", "block") and size > 0 and inputs % size:
            return True
        if scheme.granularity == "block" and checkpoint.devices > 1 and outputs % size:
            return True
        words = 8 if scheme.is_integer and scheme.activation is None else 1
        packed = checkpoint.format in ("gptq", "awq")
        return packed and bool(outputs % words)

    rule = "groups must divide the inputs (else use one scale per channel, -gch)"
    if checkpoint.devices > 1:
        rule = (
            f"each of {checkpoint.devices} devices must get whole groups and words of every "
            "matrix; use a smaller group size, or fewer devices"
        )
    return _say(checkpoint, cut, rule)


def whole_heads(checkpoint: PlannedCheckpoint) -> list[str]:
    """Every device gets whole attention heads."""
    if not checkpoint.heads or checkpoint.heads % checkpoint.devices == 0:
        return []
    return [
        f"its {checkpoint.heads} attention heads cannot be shared by {checkpoint.devices} devices"
    ]


def one_device(checkpoint: PlannedCheckpoint) -> list[str]:
    """The checkpoint cannot be split over devices."""
    if checkpoint.devices == 1 or not checkpoint.schemes:
        return []
    return [
        f"it splits no quantized {checkpoint.format} checkpoint over {checkpoint.devices} devices; "
        "use one device, or format compressed-tensors"
    ]


def order_per_device(checkpoint: PlannedCheckpoint) -> list[str]:
    """Scattered groups cannot be split over devices."""
    if checkpoint.devices == 1:
        return []
    return _say(
        checkpoint,
        lambda scheme, linear: scheme.activation_order and is_row_parallel(linear),
        f"act-order's groups are scattered over the inputs, which {checkpoint.devices} devices "
        "share: only slow kernels take that; use -gN without -actorder",
    )


def skipped_by_part(checkpoint: PlannedCheckpoint) -> list[str]:
    """Excluded names are matched as parts of names: one must not be part of a quantized one."""
    kept = [linear.name for linear in checkpoint.linears if linear.name not in checkpoint.schemes]
    caught = [name for name in checkpoint.schemes if any(part in name for part in kept)]
    if not caught:
        return []
    return [
        f"its names of 16-bit modules also match {list_some(caught)}, which are quantized; "
        "use format compressed-tensors"
    ]


def _say(
    checkpoint: PlannedCheckpoint, offends: Callable[[Scheme, LinearSpec], bool], rule: str
) -> list[str]:
    """Return the rule with the number of modules that break it and the first of them."""
    names = [
        linear.name
        for linear in checkpoint.quantized
        if offends(checkpoint.schemes[linear.name], linear)
    ]
    if not names:
        return []
    scheme = checkpoint.schemes[names[0]]
    return [f"{rule}, but {list_some(names)} with {scheme} cannot"]
