"""Between a plan's words and what :func:`advisor.search.realise.realise` takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.methods.setting_rules import setting_problems
from advisor.methods.settings import QuantizationSettings
from advisor.plan.schema import SchemeChoice
from advisor.predict.gguf_types import module_types, stored_type
from advisor.schemes import BF16, GGUF_BLOCKS, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from advisor.modelspec import LinearSpec
    from advisor.plan.schema import Plan
    from advisor.schemes import Scheme

_SAMPLES = "samples"
_AMBIGUOUS = "gguf-q2_k"
"""The only block type whose name is that of a file type of several: see :func:`by_block_type`."""


def assignment_of(plan: Plan, linears: Sequence[LinearSpec]) -> dict[str, Scheme]:
    """Return the scheme of every quantizable module, as the plan says, and of its ends.

    Raises:
        InputError: The plan names a module that the model does not have, or no known scheme.
    """
    names = [linear.name for linear in linears]
    problems = [
        f"the plan names module {name!r}, which the model does not have.{did_you_mean(name, names)}"
        for name in sorted(plan.scheme.modules.keys() - set(names))
    ]
    ends = plan.scheme.outer
    parsed: dict[str, Scheme] = {}
    for name in sorted({plan.scheme.default, *plan.scheme.modules.values(), *ends.values()}):
        try:
            parsed[name] = parse_scheme(name)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(join_errors(problems))
    default = parsed[plan.scheme.default]
    chosen = plan.scheme.modules
    found = {name: parsed[chosen[name]] if name in chosen else default for name in names}
    named = by_block_type(found, linears, chosen)
    return named | {name: parsed[ends[name]] for name in ends}


def by_block_type(
    assignment: Mapping[str, Scheme], linears: Sequence[LinearSpec], named: Collection[str] = ()
) -> dict[str, Scheme]:
    """Return an assignment in which GGUF file types (q4_k_m) have become their block types.

    Args:
        assignment: Module path to scheme.
        linears: All of the model's modules: llama.cpp's choice depends on a module's layer.
        named: Modules that were given a scheme of their own: ``q2_k``, which is the name of a block
            type and of a file type that mixes others in, is the block type there.
    """
    inputs = {linear.name: linear.in_features for linear in linears}
    files = {scheme.weight for scheme in assignment.values() if scheme.method == "gguf"}
    types = {file_type: module_types(file_type, linears) for file_type in files}
    found = dict(assignment)
    for name, scheme in assignment.items():
        if scheme.method == "gguf":
            kind = types[scheme.weight][name]
            if name in named and scheme.weight in GGUF_BLOCKS:
                kind = stored_type(scheme.weight, inputs[name])
            found[name] = BF16 if kind == "f16" else replace(scheme, weight=kind)
    return found


def settings_of(plan: Plan) -> QuantizationSettings:
    """Return the methods' settings of a plan.

    Raises:
        InputError: A setting is unknown or breaks its rule; all of them are listed.
    """
    given = {name: value for name, value in plan.settings.items() if name != _SAMPLES}
    problems = setting_problems(given)
    samples, most = plan.settings.get(_SAMPLES), plan.calibration and plan.calibration.sequences
    if samples is not None and not (type(samples) is int and 1 <= samples <= (most or samples)):
        problems.append(
            f"setting {_SAMPLES} must be a whole number from 1 to the {most} sequences of the "
            f"calibration, but the plan says {samples!r}."
        )
    if problems:
        raise InputError(join_errors(problems))
    return QuantizationSettings(**given)  # type: ignore[arg-type]


def samples_of(plan: Plan) -> int | None:
    """Return how many calibration sequences the codes use; None for all."""
    value = plan.settings.get(_SAMPLES)
    return None if value is None else int(value)


def plan_settings(
    settings: QuantizationSettings, samples: int | None
) -> dict[str, str | int | float | bool | None]:
    """Return settings as a plan holds them; the inverse of the two functions above."""
    known: dict[str, str | int | float | bool | None] = {}
    for name, value in settings.to_dict().items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise TypeError(f"setting {name} has a value that no plan can hold: {value!r}")
        known[name] = value
    return {**known, _SAMPLES: samples}


def scheme_choice(
    name: str, format_name: str, assignment: Mapping[str, Scheme], ends: Collection[str] = ()
) -> SchemeChoice:
    """Return an assignment as a plan holds it: the commonest scheme, and the modules beside it.

    Where the commonest is also the name of a file type, all modules are named.

    Args:
        name: Of the answer.
        format_name: Checkpoint format.
        assignment: Module path to scheme.
        ends: Which of them are embedding and head.
    """
    outer = {module: str(scheme) for module, scheme in assignment.items() if module in ends}
    assignment = {module: s for module, s in assignment.items() if module not in ends}
    counted = Counter(str(scheme) for scheme in assignment.values() if scheme.is_quantized)
    default = counted.most_common(1)[0][0] if counted else "bf16"
    others = {module: str(scheme) for module, scheme in assignment.items()}
    return SchemeChoice(
        name=name,
        default=default,
        format=format_name,
        modules={
            module: scheme
            for module, scheme in others.items()
            if scheme != default or default == _AMBIGUOUS
        },
        outer=outer,
    )
