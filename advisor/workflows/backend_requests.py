"""What ``backends run`` is asked for, checked as a whole before a model is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.backends.quantizing import DEVICES, Request
from advisor.backends.registry import get_backend
from advisor.backends.requests import parse_settings, rule_of
from advisor.budgets import parse_duration
from advisor.errors import InputError, did_you_mean
from advisor.schemes import parse_scheme
from advisor.workflows.checking import Checks

if TYPE_CHECKING:
    from collections.abc import Sequence


def requested(
    name: str,
    scheme: str,
    settings: Sequence[str],
    device: str,
    timeout: str | float | None,
    seed: int,
) -> Request:
    """Return what is asked of a library, if it has that name and makes such schemes.

    Args:
        name: The backend.
        scheme: What it is to make.
        settings: Its own settings, each ``name=value``.
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout: Seconds, or text such as ``2h``; None for no limit.
        seed: Of every random choice.

    Raises:
        InputError: Lists every rule that is broken.
    """
    checks = Checks()
    backend = checks.run(lambda: get_backend(name))
    wanted = checks.run(lambda: parse_scheme(scheme))
    given = None
    if backend is not None:
        given = checks.run(lambda: parse_settings(backend, settings))
    if backend is not None and wanted is not None:
        checks.run(lambda: rule_of(backend, wanted))
    checks.run(lambda: _check_device(device))
    limit = checks.run(lambda: _limit(timeout))
    checks.settle()
    if backend is None or wanted is None or given is None:  # then something was refused
        raise InputError("the request could not be resolved.")
    return Request(backend, wanted, given, device, seed, limit)


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise InputError(
            f"--device must be one of {', '.join(DEVICES)}, but got {device!r}."
            f"{did_you_mean(device, DEVICES)}"
        )


def _limit(timeout: str | float | None) -> float | None:
    return None if timeout is None else parse_duration(timeout, "--timeout")
