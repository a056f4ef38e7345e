"""What a user asks for, checked as a whole: every offender is told at once, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from advisor.budgets import BUDGET_NAMES, Budgets, parse_duration, parse_size
from advisor.errors import InputError, did_you_mean, join_errors, split_errors
from advisor.workflows.resolve import check_preference, resolve_engine, resolve_hardware

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from advisor.hardware.profile import HardwareProfile

T = TypeVar("T")
BudgetsGiven = Budgets | Mapping[str, str | None] | None
"""Budgets, or the texts of :meth:`Budgets.from_text` by name; None is no budget."""


@dataclass(frozen=True, slots=True)
class Request:
    """What every command of advice and search is asked for.

    Attributes:
        hardware: The device.
        engine: The engine's name, with its release if one was named.
        budgets: The limits.
    """

    hardware: HardwareProfile
    engine: str
    budgets: Budgets


class Checks:
    """Collects what is wrong with one request."""

    def __init__(self) -> None:
        """Start with nothing wrong."""
        self.problems: list[str] = []

    def run(self, check: Callable[[], T]) -> T | None:
        """Return what a check returns; where it refuses, keep its reasons and return None."""
        try:
            return check()
        except InputError as error:
            self.problems += split_errors(str(error))
            return None

    def settle(self) -> None:
        """Raise all that was refused.

        Raises:
            InputError: Anything was; every reason is listed.
        """
        if self.problems:
            raise InputError(join_errors(self.problems))


def check_request(
    *,
    gpu: str,
    engine: str,
    budgets: BudgetsGiven = None,
    prefer: str = "balanced",
    others: Sequence[Callable[[], object]] = (),
    late: Sequence[Callable[[], object]] = (),
) -> Request:
    """Resolve the names and texts of a request, or say everything that is wrong with it.

    Args:
        gpu: The device, as people name it.
        engine: What serves, or ``auto``.
        budgets: Limits.
        prefer: What breaks ties.
        others: Further checks of the command.
        late: Checks that the command makes anyway, later and better: such as looking the model up.
            They are made here only where something else is wrong, to be told with it.

    Raises:
        InputError: Lists every rule that is broken.
    """
    checks = Checks()
    checks.run(lambda: check_texts(gpu=gpu, engine=engine))
    checks.settle()  # what is no text has no name that could be looked up
    limits = checks.run(lambda: _budgets(budgets))
    checks.run(lambda: check_preference(prefer))
    hardware = checks.run(lambda: resolve_hardware(gpu))
    found = checks.run(lambda: _engine(engine, hardware))
    for other in others:
        checks.run(other)
    for check in late if checks.problems else ():
        checks.run(check)
    checks.settle()
    if hardware is None or found is None or limits is None:  # then something was refused
        raise InputError("the request could not be resolved.")
    return Request(hardware, found, limits)


def seconds_of(text: str | float | None) -> float | None:
    """Return ``--time-budget`` in seconds."""
    return None if text is None else parse_duration(text, "--time-budget")


def disk_bytes_of(text: str | int | None) -> int | None:
    """Return ``--max-disk`` in bytes."""
    return None if text is None else parse_size(text, "--max-disk")


_LARGEST_SEED = 2**32 - 1
"""Of numpy and Optuna."""


def check_texts(**texts: object) -> None:
    """Refuse what is no text where one must be; by the parameter's name.

    Raises:
        InputError: Lists every one that is none.
    """
    problems = [
        f"{name} must be a text, but got {value!r}."
        for name, value in texts.items()
        if not isinstance(value, str)
    ]
    if problems:
        raise InputError(join_errors(problems))


def check_lists(**lists: object) -> None:
    """Refuse a text where several are asked for: it would be taken for its letters.

    Raises:
        InputError: Lists every one; by the parameter's name.
    """
    problems = [
        f"{name} must be a list of texts, but got {value!r}. Use [{value!r}]."
        for name, value in lists.items()
        if isinstance(value, str)
    ]
    if problems:
        raise InputError(join_errors(problems))


def check_counts(**counts: int | None) -> None:
    """Refuse numbers that a search cannot do with; None stands for a default.

    Args:
        counts: By the parameter's name: at least 1, but ``seed`` at least 0, ``sequence_length``
            and ``evaluation_sequences`` at least 2.

    Raises:
        InputError: Lists every one that is out of range.
    """
    least = {"seed": 0, "sequence_length": 2, "evaluation_sequences": 2}
    problems = []
    for name, value in counts.items():
        if value is None:
            continue
        option = f"--{name.replace('_', '-')}"
        low = least.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(f"{option} must be a whole number, but got {value!r}.")
        elif value < low:
            problems.append(f"{option} must be at least {low}, but got {value}.")
        elif name == "seed" and value > _LARGEST_SEED:
            problems.append(f"{option} must be at most {_LARGEST_SEED}, but got {value}.")
    if problems:
        raise InputError(join_errors(problems))


def check_output(target: Path) -> None:
    """Refuse, before any work, a place where no plan can be written."""
    from advisor.formats.folder import can_write

    problems = []
    if target.is_dir():
        problems.append(
            f"--output must be a file, but {target} is a folder: use {target}/plan.yaml."
        )
    parent = next((folder for folder in target.resolve().parents if folder.exists()), None)
    if parent is not None and not parent.is_dir():
        problems.append(f"--output {target} lies under {parent}, which is a file. Name another.")
    elif parent is not None and not can_write(parent):
        problems.append(
            f"--output {target} cannot be written: no file can be made in {parent}. Name another."
        )
    if problems:
        raise InputError(join_errors(problems))


def _budgets(given: BudgetsGiven) -> Budgets:
    if isinstance(given, Mapping):
        if unknown := [str(name) for name in given if name not in BUDGET_NAMES]:
            raise InputError(
                join_errors(
                    [
                        f"unknown budget {name!r}.{did_you_mean(name, BUDGET_NAMES)} "
                        f"Use one of: {', '.join(BUDGET_NAMES)}."
                        for name in unknown
                    ]
                )
            )
        return Budgets.from_text(**given)
    if given is not None and not isinstance(given, Budgets):
        raise InputError(
            "budgets must be Budgets, or texts by name such as {'max_size': '6GB'}, but got "
            f"{given!r}."
        )
    return given or Budgets()


def _engine(engine: str, hardware: HardwareProfile | None) -> str:
    """Return the engine's name; ``auto`` stays as it is where the device is not known."""
    if hardware is not None:
        return resolve_engine(engine, hardware)
    if engine.strip().lower() == "auto":
        return "auto"
    from advisor.engines import load_engine

    return load_engine(engine).name
