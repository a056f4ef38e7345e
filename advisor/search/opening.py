"""Opening a study's database while other processes may be making it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_ATTEMPTS = 8
_RACES = ("IntegrityError", "DuplicatedStudyError")
"""Errors of SQLAlchemy and Optuna that say that somebody else was faster."""
_PACKAGES = {
    "psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient",
}  # fmt: skip
"""What installs the drivers that SQLAlchemy takes where a URL names none."""


def opened(url: str, opening: Callable[[], T]) -> T:
    """Return what opening a database gives, tried again where others make it at that moment.

    Args:
        url: The database's.
        opening: Opens it.

    Raises:
        InputError: It cannot be opened.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return opening()
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:  # SQLAlchemy and each database driver have errors of their own
            if attempt + 1 < _ATTEMPTS and _is_race(error):
                time.sleep(0.2 * (attempt + 1))
                continue
            reason = _missing_driver(error) or str(error).splitlines()[0].rstrip(". ")
            raise InputError(
                f"--storage must be a database that can be opened, but {url.split('@')[-1]} gave: "
                f"{reason}. Use a file path or sqlite:///study.db."
            ) from error
    raise AssertionError("every attempt returns or raises")


def _missing_driver(error: BaseException | None) -> str | None:
    """Return what to install where a database's driver is missing; None where it is not that."""
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            package = _PACKAGES.get(error.name, error.name)
            return f"no module named {error.name!r} (pip install {package})"
        error = error.__cause__ or error.__context__
    return None


def _is_race(error: Exception) -> bool:
    """Whether another process has just made what was to be made."""
    if any(kind.__name__ in _RACES for kind in type(error).__mro__):
        return True
    return any(text in str(error).lower() for text in ("already exists", "database is locked"))
