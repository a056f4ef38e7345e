"""Budgets: what an answer may cost, in the same words in the CLI, the API and the plan."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from advisor.errors import InputError, join_errors

_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_size(text: str | int, option: str = "size") -> int:
    """Parse ``6GB`` (10^9), ``12GiB`` (2^30), ``120MB`` or a number of bytes.

    Raises:
        InputError: Not a positive size, an unknown unit, or a text of less than 1000 without one
            (a bare 6 is taken for a slip of 6GB).
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]*)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        raise InputError(
            f"{option} must be a size such as 6GB (10^9 bytes) or 12GiB (2^30), but got {text!r}."
        )
    size = round(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise InputError(f"{option} must be positive, but got {text!r}.")
    if isinstance(text, str) and not match[2] and size < 1000:
        raise InputError(
            f"{option} must have a unit, but got {text!r}, which is {size} bytes - did you mean "
            f"{text.strip()}GB?"
        )
    return size


def parse_fraction(text: str | float, option: str = "fraction") -> float:
    """Parse ``3%`` or ``0.03`` to 0.03.

    Raises:
        InputError: Not a number, negative, or 100% and more (a bare 3 is taken for a slip of 3%).
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*", str(text))
    if match is None:
        raise InputError(f"{option} must be a fraction such as 3% or 0.03, but got {text!r}.")
    value = float(match[1]) / (100 if match[2] else 1)
    if not match[2] and value >= 1:
        raise InputError(f"{option} must be below 1 or carry a %: {text!r} - did you mean {text}%?")
    return value


def parse_points(text: str | float, option: str = "points") -> float:
    """Parse ``1pp`` (percentage points of accuracy) or ``0.01`` to 0.01.

    Raises:
        InputError: Not a number of points, negative, or 100 points and more.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(pp|%?)\s*", str(text))
    value = math.nan if match is None else float(match[1]) / (100 if match[2] else 1)
    if not 0 <= value < 1:
        raise InputError(f"{option} must be percentage points such as 1pp, but got {text!r}.")
    return value


def parse_duration(text: str | float, option: str = "duration") -> float:
    """Parse ``90s``, ``10m``, ``2h`` or a number of seconds.

    Raises:
        InputError: Not a positive duration.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(s|m|min|h)?\s*", str(text))
    factor = {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}
    seconds = 0.0 if match is None else float(match[1]) * factor[match[2]]
    if seconds <= 0:
        raise InputError(f"{option} must be a duration such as 90s, 10m or 2h, but got {text!r}.")
    return seconds


BUDGET_NAMES = (
    "max_size", "max_memory", "max_loss", "max_kl", "max_accuracy_drop", "task", "min_speed",
)  # fmt: skip
"""What :meth:`Budgets.from_text` takes."""


@dataclass(frozen=True, slots=True)
class Budgets:
    """Limits on an answer; None means no limit.

    Attributes:
        max_size_bytes: Bytes of the checkpoint's weight files.
        max_memory_bytes: Peak device memory when serving at the context and batch.
        max_loss: Relative perplexity increase over the unquantized model (0.03 = 3%).
        max_kl: Mean KL(reference ‖ quantized) per token, nats.
        max_accuracy_drop: Drop of accuracy on ``task`` (0.01 = one percentage point).
        task: Benchmark that ``max_accuracy_drop`` speaks of.
        min_tokens_per_s: Decode speed at the batch and context.
    """

    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    max_loss: float | None = None
    max_kl: float | None = None
    max_accuracy_drop: float | None = None
    task: str | None = None
    min_tokens_per_s: float | None = None

    def __post_init__(self) -> None:
        """Reject limits that nothing could ever meet, all at once."""
        problems = []
        for name in ("max_size_bytes", "max_memory_bytes", "min_tokens_per_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} must be positive, but got {value}.")
        for name in ("max_loss", "max_kl", "max_accuracy_drop"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                problems.append(f"{name} must be zero or positive, but got {value}.")
        if self.max_accuracy_drop is not None and self.task is None:
            problems.append("--max-accuracy-drop needs --task NAME: the benchmark it speaks of.")
        if self.task is not None and self.max_accuracy_drop is None:
            problems.append(f"--task {self.task} needs --max-accuracy-drop, for example 1pp.")
        if problems:
            raise InputError(join_errors(problems))

    @classmethod
    def from_text(
        cls,
        *,
        max_size: str | int | None = None,
        max_memory: str | int | None = None,
        max_loss: str | float | None = None,
        max_kl: str | float | None = None,
        max_accuracy_drop: str | float | None = None,
        task: str | None = None,
        min_speed: str | float | None = None,
    ) -> Budgets:
        """Parse budgets as a user writes them.

        Raises:
            InputError: Any value breaks its rule; every offender is listed.
        """
        problems: list[str] = []
        values: dict[str, object] = {"task": task}

        def take(field: str, parse: object, text: object, option: str) -> None:
            if text is None:
                return
            try:
                values[field] = parse(text, option)  # type: ignore[operator]
            except InputError as error:
                problems.append(str(error))

        take("max_size_bytes", parse_size, max_size, "--max-size")
        take("max_memory_bytes", parse_size, max_memory, "--max-memory")
        take("max_loss", parse_fraction, max_loss, "--max-loss")
        take("max_kl", _parse_number, max_kl, "--max-kl")
        take("max_accuracy_drop", parse_points, max_accuracy_drop, "--max-accuracy-drop")
        take("min_tokens_per_s", _parse_number, min_speed, "--min-speed")
        if problems:
            raise InputError(join_errors(problems))
        return cls(**values)  # type: ignore[arg-type]

    def limits(self) -> dict[str, float]:
        """Return the limits that were given, by the name of their option."""
        found = {
            "max_size": self.max_size_bytes, "max_memory": self.max_memory_bytes,
            "max_loss": self.max_loss, "max_kl": self.max_kl,
            "max_accuracy_drop": self.max_accuracy_drop, "min_speed": self.min_tokens_per_s,
        }  # fmt: skip
        return {name: limit for name, limit in found.items() if limit is not None}

    def to_dict(self) -> dict[str, object]:
        """Return every limit by name, None where there is none."""
        return asdict(self)


def loosened(budget: str, value: float) -> float:
    """Return the nearest limit in round figures that a value meets, as a person types it.

    Args:
        budget: ``max_size``, ``max_memory``, ``max_loss``, ``max_kl``, ``max_accuracy_drop`` or
            ``min_speed``.
        value: What the limit must allow, in the budget's unit, positive.

    Returns:
        Two digits of a loss or a drop of accuracy, three of anything else; bytes are whole.
    """
    exact = Decimal(repr(value))
    digits = 2 if budget in ("max_loss", "max_accuracy_drop") else 3
    step = Decimal((0, (1,), exact.adjusted() - digits + 1))
    found = exact.quantize(step, ROUND_FLOOR if budget == "min_speed" else ROUND_CEILING)
    return int(found) if budget in ("max_size", "max_memory") else float(found)


def as_option(budget: str, value: float) -> str:
    """Return a limit as it is typed: ``--max-size 6GB``, ``--max-loss 3%``."""
    text = f"{value:.12g}"
    if budget in ("max_size", "max_memory"):
        text = _typed_size(int(value))
    elif budget in ("max_loss", "max_accuracy_drop"):
        text = f"{100 * value:.12g}{'%' if budget == 'max_loss' else 'pp'}"
    return f"--{budget.replace('_', '-')} {text}"


def _typed_size(size_bytes: int) -> str:
    """Return a size in the largest unit that needs no more than two decimals."""
    for unit in ("GB", "GiB", "MB", "MiB", "kB"):
        factor = _UNITS[unit.lower()]
        if size_bytes >= factor and 100 * size_bytes % factor == 0:
            return f"{size_bytes / factor:.12g}{unit}"
    return str(size_bytes)


def _parse_number(text: str | float, option: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value >= 0 and math.isfinite(value)):
        raise InputError(f"{option} must be a number, zero or positive, but got {text!r}.")
    return value
