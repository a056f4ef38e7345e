"""What may be asked of a backend: every rule is checked before any work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.backends.mixtures import mixture_problems
from advisor.errors import BackendError, InputError, did_you_mean, join_errors
from advisor.hardware.detect import detect

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.backends.registry import Backend, Makes, Setting
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme


def rule_of(backend: Backend, scheme: Scheme) -> Makes:
    """Return what a backend knows of a scheme.

    Raises:
        InputError: It does not make it; the message says what it makes.
    """
    same = [one for one in backend.makes if one.method == scheme.method]
    if not same:
        raise InputError(
            f"{backend.name} makes {', '.join(backend.methods)}, but {scheme} was asked for."
            f"{did_you_mean(scheme.method, backend.methods)}"
        )
    problems = [_difference(one, scheme) for one in same]
    for one, problem in zip(same, problems, strict=True):
        if problem is None:
            return one
    nearest = min((problem for problem in problems if problem is not None), key=lambda p: p[0])
    raise InputError(f"{backend.name} does not make {scheme}: {nearest[1]}.")


def _difference(one: Makes, scheme: Scheme) -> tuple[int, str] | None:
    """Return (how many values differ, which and what they may be), or None where none does."""
    pairs: list[tuple[str, object, Sequence[object]]] = [
        ("the weights", scheme.weight, one.weights),
        ("what a scale covers", scheme.granularity, one.granularities),
        ("symmetric", scheme.symmetric, one.symmetric),
        ("the inputs", scheme.activation or "16-bit", [a or "16-bit" for a in one.activations]),
        ("act-order", scheme.activation_order, (False, True) if one.activation_order else (False,)),
        (
            "double quantization",
            scheme.double_quantization,
            (False, True) if one.double_quantization else (False,),
        ),
    ]
    wrong = [(what, value, allowed) for what, value, allowed in pairs if value not in allowed]
    if not wrong:
        return None
    texts = [
        f"{what} must be {' or '.join(map(str, allowed))}, but {value} was asked for"
        for what, value, allowed in wrong
    ]
    return len(wrong), "; ".join(texts)


def check_request(
    backend: Backend,
    scheme: Scheme,
    linears: Sequence[LinearSpec],
    settings: Mapping[str, Setting],
    device: str,
) -> Makes:
    """Return the rule of a scheme that a backend can make of a model on this machine.

    Args:
        backend: The backend.
        scheme: What to make.
        linears: The model's quantizable modules.
        settings: Those that a user changed.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        InputError: The scheme, a setting or a shape breaks a rule; all are listed.
        BackendError: It needs CUDA, and there is none.
    """
    problems = _setting_problems(backend, settings) + shape_problems(scheme, linears)
    problems += mixture_problems(backend, scheme, settings, linears)
    try:
        rule = rule_of(backend, scheme)
    except InputError as error:
        raise InputError(join_errors([str(error), *problems])) from None
    if problems:
        raise InputError(join_errors(problems))
    if backend.cuda_only or rule.cuda_only:
        check_cuda(backend, scheme, device)
    return rule


def check_cuda(backend: Backend, scheme: Scheme, device: str) -> None:
    """Refuse, before any work, what needs a CUDA device where there is none.

    Raises:
        BackendError: There is none, or the CPU was asked for.
    """
    present = any(gpu.vendor == "NVIDIA" for gpu in detect().gpus)
    if device == "cpu" or not present:
        found = "the CPU was asked for" if device == "cpu" else "this machine has none"
        does = "quantizes" if backend.cuda_only else f"makes {scheme}"
        raise BackendError(
            f"{backend.name} {does} on CUDA devices only, and {found}. "
            "Run it on a machine with an NVIDIA GPU, or use another backend: advisor backends list"
        )


def _setting_problems(backend: Backend, settings: Mapping[str, Setting]) -> list[str]:
    known = backend.settings
    problems = [
        f"{backend.name} has no setting {name!r}: it has {', '.join(known) or 'none'}."
        f"{did_you_mean(name, known)}"
        for name in settings
        if name not in known
    ]
    for name, value in settings.items():
        kind = type(known.get(name, value))
        fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
        if not fits or (kind is not bool and isinstance(value, bool)):
            problems.append(f"{name} must be of type {kind.__name__}, but got {value!r}.")
    return problems


def shape_problems(scheme: Scheme, linears: Sequence[LinearSpec]) -> list[str]:
    """Return which modules' shapes a scheme does not fit."""
    if not scheme.is_integer or scheme.method == "llm.int8":
        return []
    size = scheme.group_size if scheme.granularity == "group" else None
    problems = []
    wrong = [linear for linear in linears if size and linear.in_features % size]
    if wrong:
        problems.append(
            f"group_size must divide in_features, but got group_size={size} for {len(wrong)} "
            f"modules with in_features={wrong[0].in_features} (first: {wrong[0].name})."
        )
    return problems


def parse_settings(backend: Backend, texts: Sequence[str]) -> dict[str, Setting]:
    """Return settings given as ``name=value``, of the types that the backend's own have.

    Raises:
        InputError: One is no ``name=value``, is unknown, or has a value of another type.
    """
    found: dict[str, Setting] = {}
    problems = []
    for text in texts:
        name, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not name:
            problems.append(f"--setting must be NAME=VALUE, but got {text!r}.")
            continue
        try:
            found[name] = _parsed(value, backend.settings.get(name, ""))
        except ValueError:
            kind = type(backend.settings[name]).__name__
            problems.append(f"--setting {name} must be of type {kind}, but got {value!r}.")
    problems += _setting_problems(backend, found)
    if problems:
        raise InputError(join_errors(problems))
    return found


def _parsed(value: str, example: Setting) -> Setting:
    if isinstance(example, bool):
        choices = {"true": True, "false": False}
        if value.lower() not in choices:
            raise ValueError(value)
        return choices[value.lower()]
    return type(example)(value)
