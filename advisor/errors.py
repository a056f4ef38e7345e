"""Errors that users meet: each states the rule, the value and the next step."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class AdvisorError(Exception):
    """Base of every error that Advisor raises on purpose.

    Attributes:
        exit_code: Process exit status of the command that met this error.
    """

    exit_code = 1


class InputError(AdvisorError):
    """A value given by the user breaks a rule; nothing was written (exit code 2)."""

    exit_code = 2


class InfeasibleError(AdvisorError):
    """No candidate meets the budgets (exit code 3)."""

    exit_code = 3


class VerificationError(AdvisorError):
    """A checkpoint is not what its plan says (exit code 1)."""


class BackendError(AdvisorError):
    """Another library failed or cannot run here (exit code 1)."""


def join_errors(messages: Sequence[str], most: int | None = None) -> str:
    """Join several complaints into one message, so that all offenders are seen at once.

    Args:
        messages: At least one.
        most: Complaints shown at most; of more, the number is said.
    """
    if len(messages) == 1:
        return messages[0]
    shown = list(messages[:most])
    if rest := len(messages) - len(shown):
        shown.append(f"... and {rest} more")
    return f"{len(messages)} problems:" + "".join(f"\n  - {message}" for message in shown)


def split_errors(message: str) -> list[str]:
    """Return the complaints of a message that :func:`join_errors` made; of another, itself."""
    head, *rest = message.split("\n  - ")
    if rest and head == f"{len(rest)} problems:":
        return rest
    return [message]


def did_you_mean(name: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return ``' Did you mean ...?'`` for a mistyped name, or an empty string.

    Args:
        name: What the user typed.
        known: All valid names.
        most: Number of suggestions at most.
    """
    table = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), table, n=most, cutoff=0.6)
    if not close:
        return ""
    return f" Did you mean {' or '.join(repr(table[match]) for match in close)}?"
