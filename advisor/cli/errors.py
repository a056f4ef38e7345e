"""What a person sees when something goes wrong: one clear line, never a traceback."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from advisor.cli.options import state
from advisor.errors import AdvisorError

P = ParamSpec("P")


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn exceptions of a command into an exit status and one line on stderr.

    With ``--json`` the same is said on stdout as ``{"schema_version": 1, "error": {...}}``.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        logging.basicConfig(
            stream=sys.stderr,
            level=logging.INFO if state.verbose else logging.ERROR,
            format="%(asctime)s %(name)s: %(message)s",
            datefmt="%H:%M:%S",
        )
        try:
            command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except AdvisorError as error:
            if state.debug:
                raise
            _say("error", str(error), error.exit_code, type(error).__name__)
        except KeyboardInterrupt:
            _say(
                "stopped",
                "interrupted; finished work is kept, run the command again",
                1,
                "Interrupted",
            )
        except Exception as error:
            if state.debug:
                raise
            kind = type(error).__name__
            text = " ".join(str(error).split())
            _say("error", f"{kind}: {text} (run again with --debug for the traceback)", 1, kind)

    return run


def _say(label: str, message: str, exit_code: int, kind: str) -> None:
    if state.json:
        failure = {"type": kind, "message": message, "exit_code": exit_code}
        sys.stdout.write(json.dumps({"schema_version": 1, "error": failure}) + "\n")
    typer.secho(f"{label}: ", fg="red", bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    raise typer.Exit(exit_code)
