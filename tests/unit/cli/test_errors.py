from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3

import pytest
import typer

from advisor.cli.errors import guarded
from advisor.cli.options import state
from advisor.errors import BackendError, InfeasibleError, InputError, VerificationError


def fail_with(error):
    @guarded
    def command():
        raise error

    with pytest.raises(SystemExit) as stop:
        command()
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("bad"), 2),
        (InfeasibleError("bad"), 3),
        (VerificationError("bad"), 1),
        (BackendError("bad"), 1),
        (typer.BadParameter("bad"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2),
        (OSError(errno.EIO, "Input/output error"), 1),
        (ValueError("bad"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_exit_codes(error, code, capsys):
    assert fail_with(error) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "Traceback" not in captured.err


def test_an_unexpected_error_says_how_to_see_more(capsys):
    fail_with(ZeroDivisionError("division\nby zero"))
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: division by zero (run again with --debug for the traceback)\n"
    )


def test_debug_shows_the_traceback():
    state.debug = True

    @guarded
    def command():
        raise InputError("bad")

    with pytest.raises(InputError):
        command()


def test_json_says_the_same_on_stdout(capsys):
    state.json = True
    fail_with(InfeasibleError("nothing fits"))
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "schema_version": 1,
        "error": {"type": "InfeasibleError", "message": "nothing fits", "exit_code": 3},
    }
    assert captured.err == "error: nothing fits\n"


@pytest.mark.parametrize("code", [0, 1, 3])
def test_an_exit_on_purpose_passes(code):
    @guarded
    def command():
        raise typer.Exit(code)

    with pytest.raises(typer.Exit) as stop:
        command()
    assert stop.value.exit_code == code


def test_what_libraries_say_by_themselves_is_shown_with_verbose_alone(capsys, monkeypatch):
    # Importing huggingface_hub gives its logger a level of its own, which the root's does not bind.
    library = logging.getLogger("advisor_test_library")
    library.setLevel(logging.WARNING)
    for name in ("HF_HUB_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])

    @guarded
    def command():
        library.warning("retrying in 8 s")

    command()
    assert os.environ["HF_HUB_VERBOSITY"] == os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    assert capsys.readouterr().err == ""


def test_a_full_disk_is_recognized_behind_what_libraries_make_of_it(capsys):
    error = RuntimeError("An exception is raised during the commit.")
    error.__cause__ = sqlite3.OperationalError("database or disk is full")
    assert fail_with(error) == 2
    assert "the disk is full. Free some room" in capsys.readouterr().err


def test_a_library_that_is_missing_is_named_with_what_installs_it(capsys):
    assert fail_with(ModuleNotFoundError("No module named 'optuna'", name="optuna")) == 1
    assert "optuna is not installed, and this command needs it. Install it: pip install optuna" in (
        capsys.readouterr().err
    )
    fail_with(ModuleNotFoundError("No module named 'x'", name="compressed_tensors"))
    assert "pip install compressed-tensors;" in capsys.readouterr().err
    fail_with(ModuleNotFoundError("No module named 'advisor.nope'", name="advisor.nope"))
    assert "ModuleNotFoundError" in capsys.readouterr().err


@pytest.mark.parametrize(("setting", "coloured"), [("", True), ("1", False)])
def test_an_error_has_no_colour_where_none_is_wanted(monkeypatch, capsys, setting, coloured):
    """On a terminal, which is what decides otherwise."""
    monkeypatch.setenv("NO_COLOR", setting)
    said = []
    monkeypatch.setattr(typer, "secho", lambda text, **style: said.append((text, style["fg"])))
    fail_with(InputError("bad"))
    assert said == ([("error: ", "red")] if coloured else [])
    assert capsys.readouterr().err == ("bad\n" if coloured else "error: bad\n")
