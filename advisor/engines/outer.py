"""Whether an engine serves a quantized embedding or head, and what to say where it does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.engines.releases import holds
from advisor.engines.rules import load_engine
from advisor.engines.verdict import verdict
from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.engines.options import MixtureOptions
    from advisor.engines.rules import OuterRule
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec.outer import OuterModule
    from advisor.schemes import Scheme

OPTIONS = {"head": "--quantize-head", "embedding": "--quantize-embedding"}


def outer_rule(engine: str, format: str, module: OuterModule) -> OuterRule | None:
    """Return the rule by which an engine reads an end of the model quantized, or None.

    Args:
        engine: Name of the engine.
        format: Checkpoint format.
        module: The embedding or the head.
    """
    profile = load_engine(engine)
    return next(
        (
            rule
            for rule in profile.outer
            if holds(rule, profile.release)
            and format in rule.formats
            and module.role in rule.roles
            and (rule.tied or not module.tied)
            and module.linear.out_features % rule.rows_multiple == 0
        ),
        None,
    )


def ends_taking(
    scheme: Scheme,
    hardware: HardwareProfile,
    engine: str,
    format: str,
    modules: Sequence[OuterModule],
) -> list[str]:
    """Return the ends of a model that take the scheme of its linears: the engine reads it there.

    Args:
        scheme: Of the linears; inputs stay in 16 bits at the ends.
        hardware: The device.
        engine: Name of the engine.
        format: Checkpoint format.
        modules: What is to be quantized.
    """
    found = []
    for module in modules:
        rule = outer_rule(engine, format, module)
        if rule is None or not scheme.is_quantized or scheme.activation is not None:
            continue
        if rule.methods and scheme.method not in rule.methods:
            continue
        runs = verdict(engine, scheme, hardware, [module.linear], checkpoint_format=format)
        if runs.support != "none" and not runs.kept_16bit:
            found.append(module.name)
    return found


def outer_problems(engine: str, format: str, modules: Sequence[OuterModule]) -> list[str]:
    """Return why an engine could not serve these quantized, a sentence for each that it cannot.

    Args:
        engine: Name of the engine.
        format: Checkpoint format.
        modules: What is to be quantized.
    """
    return [
        _problem(engine, format, module)
        for module in modules
        if outer_rule(engine, format, module) is None
    ]


def _problem(engine: str, format: str, module: OuterModule) -> str:
    """Say why, and what would do."""
    title = load_engine(engine).title
    option = OPTIONS[module.role]
    if module.tied:
        megabytes = 2 * module.linear.parameters / 1e6
        return (
            f"{module.name} is embedding and head in one (tie_word_embeddings), which {title} "
            f"reads from a {format} checkpoint in 16 bits only; a quantized head beside it would "
            f"be stored on top of these {megabytes:.1f} MB and save nothing. Drop --quantize-head "
            "and --quantize-embedding, or use --engine llama.cpp, whose files quantize it."
        )
    for rule in load_engine(engine).outer:
        if format in rule.formats and module.role in rule.roles and rule.rows_multiple > 1:
            return (
                f"{title} reads a quantized {module.role} from a {format} checkpoint where the "
                f"vocabulary is a multiple of {rule.rows_multiple}, but {module.name} has "
                f"{module.linear.out_features} rows ({load_engine(engine).source(rule.source)}). "
                f"Use format compressed-tensors, or drop {option}."
            )
    able = sorted({f for rule in load_engine(engine).outer if module.role in rule.roles
                   for f in rule.formats})  # fmt: skip
    reads = f"; it does in {', '.join(able)}" if able else ""
    return (
        f"{title} is not known to read a quantized {module.role} ({module.name}) in a {format} "
        f"checkpoint{reads}. Drop {option}."
    )


def with_ends(
    engine: str,
    hardware: HardwareProfile,
    offered: MixtureOptions,
    modules: Sequence[OuterModule],
) -> tuple[MixtureOptions, tuple[OuterModule, ...]]:
    """Return the options with embedding and head among the modules that some do not fit.

    Args:
        engine: Name of the engine.
        hardware: The device.
        offered: What one checkpoint may mix.
        modules: What is to be quantized, which :func:`outer_problems` found no fault with.

    Raises:
        InputError: Nothing that is offered fits one of them.
    """
    unfit = dict(offered.unfit)
    for module in modules:
        rule = outer_rule(engine, offered.format, module)
        whys = []
        able = [s for s in offered.schemes if s.is_quantized and s.activation is None]
        for scheme in able:
            found = verdict(
                engine, scheme, hardware, [module.linear], checkpoint_format=offered.format
            )
            methods = rule.methods if rule is not None else ()
            if found.support == "none" or found.kept_16bit:
                whys.append(f"{scheme}: {found.reason}")
            elif methods and scheme.method not in methods:
                whys.append(f"{scheme}: it is none of {', '.join(methods)}")
            else:
                continue
            unfit[scheme] = unfit.get(scheme, frozenset()) | {module.name}
        if len(whys) == len(able):
            raise InputError(
                f"{module.name} ({module.linear.out_features}x{module.linear.in_features}) fits "
                f"nothing that the engine offers: {'; '.join(whys)}. Drop {OPTIONS[module.role]}."
            )
    return replace(offered, unfit=unfit), tuple(modules)
