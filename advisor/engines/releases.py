"""Releases of engines: ``vllm==0.27`` names one, and rules say from and until which they hold.

Engines drop formats and add kernels. Rules carry the release that brought them (``since``) and the
first one without them (``until``), so that the answer is today's by default and that of the release
which a server really runs where one is named.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Protocol

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_SEPARATOR = "=="
_RELEASE = re.compile(r"\d+(\.\d+)*")


class Dated(Protocol):
    """A rule that holds in some releases only."""

    @property
    def since(self) -> str | None:
        """Return the first release with the rule."""

    @property
    def until(self) -> str | None:
        """Return the first release without it."""


def split_engine(engine: str) -> tuple[str, str]:
    """Return the name and the release of ``vllm==0.27``; the release is empty where none is named.

    Raises:
        InputError: What follows ``==`` is no release.
    """
    name, separator, release = engine.strip().lower().partition(_SEPARATOR)
    name, release = name.strip(), release.strip()
    if separator and not _RELEASE.fullmatch(release):
        raise InputError(
            f"a release is digits and dots, but got {release!r} in {engine!r}: "
            f"write it as {name}==0.27."
        )
    return name, release


def engine_name(engine: str) -> str:
    """Return an engine's name without its release: the key of what does not depend on it."""
    return split_engine(engine)[0]


def named(name: str, release: str) -> str:
    """Return the engine as a user writes it: ``vllm==0.27``, or the name alone."""
    return f"{name}{_SEPARATOR}{release}" if release else name


def holds(rule: Dated, release: str) -> bool:
    """Return whether a rule holds in a release; an empty release is newer than any ``until``."""
    if not release:
        return rule.until is None
    number = _numbers(release)
    if rule.since is not None and number < _numbers(rule.since):
        return False
    return rule.until is None or number < _numbers(rule.until)


def not_in(rule: Dated, release: str) -> str | None:
    """Say in words why a rule does not hold in a release, or return None."""
    if holds(rule, release):
        return None
    if rule.until is not None and (not release or _numbers(release) >= _numbers(rule.until)):
        return f"gone since release {rule.until}"
    return f"new in release {rule.since}, this is {release}"


def minor_before(release: str) -> str:
    """Return the minor release before one: ``0.27`` for ``0.28``."""
    numbers = list(_numbers(release))
    numbers[-1] = max(0, numbers[-1] - 1)
    return ".".join(str(number) for number in numbers)


def check_release(title: str, name: str, release: str, known: Sequence[str]) -> None:
    """Refuse a release that the rules say nothing about.

    Args:
        title: The engine as people write it.
        name: The engine's name.
        release: The release asked for.
        known: Oldest and newest release that the rules were read from; empty = none is named.

    Raises:
        InputError: The rules name no releases, or not this one.
    """
    if not known:
        raise InputError(
            f"the rules of {title} tell no releases apart: use --engine {name}, or a profile of "
            "your own in --profiles."
        )
    oldest, newest = known
    number = _numbers(release)
    if number < _numbers(oldest) or number[: len(_numbers(newest))] > _numbers(newest):
        raise InputError(
            f"the rules of {title} were read from releases {oldest} to {newest}, but got "
            f"{release}: use --engine {name} for the newest, {named(name, oldest)} for the oldest, "
            "or a profile of your own in --profiles."
        )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
