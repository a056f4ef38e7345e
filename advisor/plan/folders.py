"""Where Advisor keeps what can be computed or installed again."""

from __future__ import annotations

import os
from pathlib import Path

from advisor.errors import InputError


def cache_root() -> Path:
    """Return the folder of everything that can be computed again.

    ``$ADVISOR_CACHE``, else ``advisor`` in the user's folder of caches (``$XDG_CACHE_HOME``,
    ``~/.cache``).

    Raises:
        InputError: The user has no home, and no variable names a folder.
    """
    return _own_folder("ADVISOR_CACHE", "XDG_CACHE_HOME", ".cache")


def environments_root() -> Path:
    """Return where environments of other libraries lie.

    ``$ADVISOR_BACKENDS``, else ``advisor/backends`` in the user's folder of data
    (``$XDG_DATA_HOME``, ``~/.local/share``).

    Raises:
        InputError: As :func:`cache_root`.
    """
    return _own_folder("ADVISOR_BACKENDS", "XDG_DATA_HOME", ".local/share", "backends").absolute()


def _own_folder(variable: str, base: str, usual: str, *inside: str) -> Path:
    """Return the folder that a variable names, or the one inside the user's own."""
    if chosen := os.environ.get(variable):
        return Path(chosen).expanduser()
    parent = Path(os.environ.get(base, ""))
    if not parent.is_absolute():  # unset; the specification has relative ones ignored
        try:
            parent = Path.home() / usual
        except RuntimeError as error:
            raise InputError(
                f"{variable} must name a folder where this user has no home, but it is not set. "
                f"For example: export {variable}=/tmp/advisor"
            ) from error
    return parent.joinpath("advisor", *inside)
