"""Mixtures that a library makes by itself: what it may choose from, module by module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import AdvisorError, InputError
from advisor.schemes import BF16, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.backends.registry import Backend, Setting
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme

TARGET = "target_bits"
"""Setting: bits per weight to choose for, scales and zero points counted; 0 for no mixture."""
OPTIONS = "options"
"""Setting: what may be chosen beside the scheme, as ``int8-g64-sym,int4-g32-sym,bf16``."""
_SCALE_BITS = 16


def further_schemes(scheme: Scheme, settings: Mapping[str, Setting]) -> tuple[Scheme, ...]:
    """Return what a library may choose beside a scheme; nothing where no mixture is asked for.

    Args:
        scheme: What is asked for.
        settings: The library's settings.

    Raises:
        InputError: An option is no scheme.
    """
    texts = [text.strip() for text in str(settings.get(OPTIONS, "")).split(",")]
    found = []
    for text in filter(None, texts):
        name = text if text == str(BF16) else f"{scheme.method}-{text}"
        try:
            found.append(parse_scheme(name))
        except InputError as error:
            raise InputError(
                f"{OPTIONS} must name schemes without their method, as int8-g64-sym, or {BF16}, "
                f"but got {text!r}: {error}"
            ) from None
    return tuple(option for option in dict.fromkeys(found) if option != scheme)


def together(linears: Sequence[LinearSpec]) -> tuple[tuple[str, ...], ...]:
    """Return the names of the modules that engines fuse, which must share a scheme."""
    groups: dict[str, list[str]] = {}
    for linear in linears:
        groups.setdefault(linear.fused_group, []).append(linear.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def mixture_problems(
    backend: Backend,
    scheme: Scheme,
    settings: Mapping[str, Setting],
    linears: Sequence[LinearSpec],
) -> list[str]:
    """Return what is wrong with a mixture that is asked for, option by option."""
    from advisor.backends.requests import rule_of, shape_problems

    target = settings.get(TARGET, 0.0)
    try:
        options = further_schemes(scheme, settings)
    except InputError as error:
        return [str(error)]
    if not isinstance(target, int | float) or (not options and not target):
        return []  # a value of another type is said where types are
    if not options or target <= 0:
        missing, given = (OPTIONS, TARGET) if not options else (TARGET, OPTIONS)
        return [
            f"a mixture needs {TARGET} and {OPTIONS}, but only {given} was given. "
            f"Add --setting {missing}={'int8-g64-sym' if missing == OPTIONS else '4.6'}"
        ]
    problems = []
    for option in options:
        if option == BF16:
            continue
        problems += shape_problems(option, linears)
        try:
            rule_of(backend, option)
        except AdvisorError as error:
            problems.append(str(error))
    bits = [average_bits(option, linears) for option in (scheme, *options)]
    if not problems and not min(bits) <= target <= max(bits):
        problems.append(
            f"{TARGET} must lie between the options' own {min(bits):.3f} and {max(bits):.3f} bits "
            f"per weight, but got {target:g}."
        )
    return problems


def average_bits(scheme: Scheme, linears: Sequence[LinearSpec]) -> float:
    """Return the bits per weight of a scheme, a 16-bit scale and a zero point a group counted."""
    if not scheme.is_integer:
        return scheme.bits
    weights = sum(linear.parameters for linear in linears)
    groups = sum(
        linear.out_features
        * (linear.in_features // (scheme.group_size or 1) if scheme.granularity == "group" else 1)
        for linear in linears
    )
    return scheme.bits + groups * (_SCALE_BITS + scheme.bits) / weights
