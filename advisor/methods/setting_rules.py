"""What the settings of a plan may be: a hand may have written them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from advisor.errors import did_you_mean
from advisor.methods.settings import SCALE_DTYPES, QuantizationSettings

if TYPE_CHECKING:
    from collections.abc import Mapping

_SHARE, _ABOVE_0, _WHOLE, _COUNT = "in (0, 1]", "above 0", "in [0, 1]", "at least 1"
_RULES = {
    "damping": _SHARE, "descent_damping": _SHARE, "clip_shrink": _SHARE,
    "output_damping": _ABOVE_0, "correction_damping": _ABOVE_0,
    "output_feedback": _WHOLE, "smoothing": _WHOLE, "correction": _WHOLE,
    "column_block": _COUNT, "clip_steps": _COUNT, "scale_steps": _COUNT,
    "descent": "at least 0", "rotation_seed": "at least 0",
}  # fmt: skip
_WORDS = {
    "clip": ("none", "gptq", "mse"),
    "rotation": ("none", "hadamard"),
    "scale_dtype": tuple(SCALE_DTYPES),
}


def setting_problems(given: Mapping[str, object]) -> list[str]:
    """Return what is wrong with settings: unknown names, other types, values out of range.

    Args:
        given: Settings by name, as a plan holds them.
    """
    known = {field.name: field.default for field in fields(QuantizationSettings)}
    problems = []
    for name, value in given.items():
        if name not in known:
            problems.append(f"unknown setting {name!r} in the plan.{did_you_mean(name, known)}")
        elif (rule := _broken(name, value, known[name])) is not None:
            problems.append(f"setting {name} must be {rule}, but the plan says {value!r}.")
    return problems


def _broken(name: str, value: object, default: object) -> str | None:
    """Return the rule that a known setting breaks."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, str):
        words = _WORDS.get(name)
        if isinstance(value, str) and (words is None or value in words):
            return None
        return "a text" if words is None else f"one of {', '.join(words)}"
    whole = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return "a whole number" if whole else "a number"
    return None if _holds(_RULES[name], float(value)) else _RULES[name]


def _holds(rule: str, value: float) -> bool:
    return {
        _SHARE: 0 < value <= 1,
        _ABOVE_0: value > 0,
        _WHOLE: 0 <= value <= 1,
        _COUNT: value >= 1,
        "at least 0": value >= 0,
    }[rule]
