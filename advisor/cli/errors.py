"""What a person sees when something goes wrong: one clear line, never a traceback."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import typer

from advisor.cli.options import state
from advisor.errors import AdvisorError

P = ParamSpec("P")
R = TypeVar("R")

_FULL_DATABASE = "database or disk is full"
_TALKATIVE = ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY")
"""What tells libraries that print by themselves to print errors alone, if set before an import."""
_USAGE_ERROR = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""What the parser of the command line raises; newer Typer brings its own copy of Click."""


_REQUIRED = (
    "torch", "transformers", "accelerate", "bitsandbytes", "compressed_tensors", "optuna",
    "safetensors", "gguf", "tokenizers", "scipy",
)  # fmt: skip
"""Modules of Advisor's requirements whose absence commands that touch weights find out."""


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn exceptions of a command into an exit status and one message on stderr.

    With ``--json`` the same is said on stdout as ``{"schema_version": 1, "error": {...}}``.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        _set_up_log()
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, SystemExit, BrokenPipeError):
            raise
        except KeyboardInterrupt as error:
            message = str(error) or "interrupted; finished work is kept, run the command again"
            raise _stop("stopped", message, 1, "Interrupted") from None
        except Exception as error:
            if isinstance(error, _USAGE_ERROR) and not _said(error):
                raise SystemExit(2) from None  # no command was named: its help was shown
            if state.debug:
                raise
            raise _stop("error", *_words(error)) from error

    return run


def _set_up_log() -> None:
    """Send the log to stderr: with ``--verbose`` all that is said, else errors alone."""
    level = logging.INFO if state.verbose else logging.ERROR
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setLevel(level)  # libraries with a level of their own pass by the root logger's
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
        root.setLevel(level)
    if not state.verbose:
        for name in _TALKATIVE:
            os.environ.setdefault(name, "error")


def _words(error: Exception) -> tuple[str, int, str]:
    """Return message, exit status and kind of an error."""
    kind = type(error).__name__
    if isinstance(error, AdvisorError):
        return str(error), error.exit_code, kind
    if isinstance(error, _USAGE_ERROR):
        return _usage(error), 2, "UsageError"
    full = next((cause for cause in _causes(error) if _is_full_disk(cause)), None)
    if full is not None:
        place = f" ({full.filename})" if isinstance(full, OSError) and full.filename else ""
        return (
            f"the disk is full{place}. Free some room, or set ADVISOR_CACHE and the output to "
            "another disk; finished work is kept.",
            2,
            "InputError",
        )
    if isinstance(error, ModuleNotFoundError) and error.name in _REQUIRED:
        return (
            f"{error.name} is not installed, and this command needs it. Install it: pip install "
            f"{error.name.replace('_', '-')}; `advisor doctor` says what else is missing.",
            1,
            kind,
        )
    text = " ".join(str(error).split())
    return f"{kind}: {text} (run again with --debug for the traceback)", 1, kind


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it came from: libraries wrap what the disk says in their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return isinstance(error, sqlite3.Error) and _FULL_DATABASE in str(error)


def _usage(error: Any) -> str:
    """Say what is wrong with the command line, and where its help is."""
    message = _said(error)
    place = error.ctx.command_path if getattr(error, "ctx", None) else "advisor"
    end = "" if message.endswith(("?", ")")) else "."
    return f"{message.rstrip('.')}{end} See: {place} --help"


def _said(error: Any) -> str:
    """Return what the parser says is wrong, on one line."""
    return " ".join(error.format_message().split())


def _stop(label: str, message: str, exit_code: int, kind: str) -> SystemExit:
    """Say what went wrong, and return what ends the process."""
    if state.json:
        failure = {"type": kind, "message": message, "exit_code": exit_code}
        sys.stdout.write(json.dumps({"schema_version": 1, "error": failure}) + "\n")
    if os.environ.get("NO_COLOR"):  # no-color.org: Rich keeps to it, Click does not
        typer.echo(f"{label}: ", nl=False, err=True)
    else:
        typer.secho(f"{label}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    return SystemExit(exit_code)
