"""Shape rules: which kernel takes each module, and which modules none takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.engines.rules import KernelRule
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

_USUAL_GROUPS = (128, 64, 32, 16)
_ROW_PARALLEL = ("o_proj", "down_proj", "dense", "dense_4h_to_h", "out_proj", "fc2", "c_proj", "w2")
"""Linears whose inputs are split over devices; of the others the outputs are."""
SPLITTING_ENGINES = ("vllm", "sglang", "tensorrt-llm")
"""Engines that split every matrix over several devices (tensor parallelism)."""
_LARGEST_SHARE_LEFT = 0.5
"""Share of the weights that may stay in 16 bits before the scheme counts as not supported."""


@dataclass(frozen=True, slots=True)
class ModuleVerdict:
    """What happens to one module.

    Attributes:
        name: Module path.
        kernel: Kernel that runs it; None where it must stay in 16 bits.
        reason: The shape rule that decided, where another kernel than the first runs it.
    """

    name: str
    kernel: str | None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _Shape:
    """Modules that are alike to a kernel: what one device holds of each."""

    in_features: int
    out_features: int
    is_expert: bool
    linears: tuple[LinearSpec, ...]
    parameters: int
    whole: bool = True
    """Whether the devices get equal parts."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the modules went.

    Attributes:
        main: Kernel that runs most weights; the first one tried where none runs any.
        others: Modules that another kernel runs, or none.
        passed: Kernels before ``main`` that a shape stopped, with the shape rule.
        share_left: Share of the weights that no kernel takes.
        shapes: The shapes themselves, for messages.
    """

    main: KernelRule
    others: tuple[ModuleVerdict, ...]
    passed: tuple[tuple[KernelRule, str], ...]
    share_left: float
    shapes: tuple[_Shape, ...]


class _Identity:
    """Key of a sequence by identity: tens of thousands of linears are not hashed again."""

    def __init__(self, linears: Sequence[LinearSpec]) -> None:
        self.linears = linears

    def __hash__(self) -> int:
        return id(self.linears)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.linears is self.linears


def is_row_parallel(linear: LinearSpec) -> bool:
    """Whether devices that share a layer split this module's inputs, and not its outputs."""
    return linear.name.rpartition(".")[2] in _ROW_PARALLEL


def share_of(linear: LinearSpec, devices: int) -> tuple[int, int] | None:
    """Return (inputs, outputs) of what each device holds; None where it cannot be cut evenly."""
    inputs, outputs = linear.in_features, linear.out_features
    if is_row_parallel(linear):
        return None if inputs % devices else (inputs // devices, outputs)
    return None if outputs % devices else (inputs, outputs // devices)


def place_modules(
    rules: Sequence[KernelRule], linears: Sequence[LinearSpec], *, fused: bool, devices: int = 1
) -> Placement:
    """Give every shape the first kernel that takes it.

    Args:
        rules: Kernels that run the scheme on the device, in the engine's order; at least one.
        linears: The model's modules; at least one.
        fused: Whether modules of one fused group run as one product of their summed outputs.
        devices: Devices that split every matrix.
    """
    shapes = _shapes(_Identity(linears), fused, devices)
    weights: dict[str, int] = {}
    chosen: list[tuple[_Shape, KernelRule | None, str | None]] = []
    for shape in shapes:
        rule, why = _first(rules, shape)
        chosen.append((shape, rule, why))
        name = rule.name if rule else ""
        weights[name] = weights.get(name, 0) + shape.parameters
    left = weights.pop("", 0)
    total = left + sum(weights.values())
    name = max(weights, key=lambda key: weights[key]) if weights else rules[0].name
    main = next(rule for rule in rules if rule.name == name)
    others = tuple(
        ModuleVerdict(linear.name, rule.name if rule else None, why)
        for shape, rule, why in chosen
        if rule is None or rule.name != name
        for linear in shape.linears
    )
    passed = tuple((rule, _stopped(rule, shapes)) for rule in rules[: rules.index(main)])
    return Placement(main, others, passed, left / max(1, total), shapes)


def refusal(scheme: Scheme, placed: Placement) -> str | None:
    """Say why shapes rule the scheme out altogether, or return None."""
    size = scheme.group_size
    if scheme.granularity == "group" and size:
        bad = [shape for shape in placed.shapes if shape.in_features % size]
        if bad:
            first = bad[0].linears[0]
            cut = first.in_features // bad[0].in_features
            each = f", of which each device gets {bad[0].in_features}" if cut > 1 else ""
            sizes = {shape.in_features for shape in placed.shapes}
            fitting = [g for g in _USUAL_GROUPS if not any(inputs % g for inputs in sizes)]
            advice = f"group size {fitting[0]}" if fitting else "one scale per channel (-gch)"
            count = sum(len(shape.linears) for shape in bad)
            return (
                f"group_size must divide in_features, but {size} does not for {count} modules "
                f"(first: {first.name} with in_features={first.in_features}{each}); use {advice}, "
                "or `advisor tune`, which gives each module what divides it"
            )
    if placed.share_left > _LARGEST_SHARE_LEFT:
        left = [module for module in placed.others if module.kernel is None]
        count = sum(len(shape.linears) for shape in placed.shapes)
        return f"shapes: {left[0].reason}; {len(left)} of {count} modules fit no kernel"
    return None


def in_words(others: Sequence[ModuleVerdict]) -> str:
    """Say which modules run elsewhere or stay in 16 bits."""
    kept = [module for module in others if module.kernel is None]
    moved = [module for module in others if module.kernel is not None]
    parts = []
    if moved:
        kernels = ", ".join(sorted({module.kernel or "" for module in moved}))
        why = f": {moved[0].reason}" if moved[0].reason else ""
        first = f"first: {moved[0].name}{why}"
        parts.append(f"; {len(moved)} modules run on {kernels} ({first})")
    if kept:
        first = f"first: {kept[0].name}: {kept[0].reason}"
        parts.append(f"; {len(kept)} modules stay in 16 bits ({first})")
    return "".join(parts)


@lru_cache(maxsize=8)
def _shapes(key: _Identity, fused: bool, devices: int) -> tuple[_Shape, ...]:
    parts = [share_of(linear, devices) for linear in key.linears]
    held = [
        part or (linear.in_features, linear.out_features)
        for part, linear in zip(parts, key.linears, strict=True)
    ]
    outs: dict[str, int] = {}
    if fused:
        for linear, (_, out) in zip(key.linears, held, strict=True):
            outs[linear.fused_group] = outs.get(linear.fused_group, 0) + out
    grouped: dict[tuple[int, int, bool, bool], list[LinearSpec]] = {}
    for linear, part, (inputs, out) in zip(key.linears, parts, held, strict=True):
        outputs = outs[linear.fused_group] if fused else out
        shape = (inputs, outputs, linear.is_expert, part is not None)
        grouped.setdefault(shape, []).append(linear)
    return tuple(
        _Shape(inputs, outputs, expert, tuple(found), sum(one.parameters for one in found), whole)
        for (inputs, outputs, expert, whole), found in grouped.items()
    )


def _first(rules: Sequence[KernelRule], shape: _Shape) -> tuple[KernelRule | None, str | None]:
    whys: list[str] = []
    for rule in rules:
        why = _problem(rule, shape)
        if why is None:
            return rule, "; ".join(whys) or None
        whys.append(why)
    return None, "; ".join(whys)


def _problem(rule: KernelRule, shape: _Shape) -> str | None:
    if not shape.whole:
        return f"{rule.name} gets no equal parts of it on so many devices"
    if rule.refuses_experts and shape.is_expert:
        return f"{rule.name} runs no experts of a mixture"
    for name, value, multiple in (
        ("in_features", shape.in_features, rule.in_multiple),
        ("out_features", shape.out_features, rule.out_multiple),
    ):
        if value % multiple:
            return f"{rule.name} needs {name} % {multiple} == 0, but it is {value}"
    return None


def _stopped(rule: KernelRule, shapes: Sequence[_Shape]) -> str:
    for shape in shapes:
        if why := _problem(rule, shape):
            return f"{why} ({shape.linears[0].name})"
    return "shapes"
