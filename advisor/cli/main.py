"""The ``advisor`` command."""

from __future__ import annotations

import inspect as introspection
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import typer

import advisor
from advisor.cli import (
    apply,
    backends,
    compare,
    demo,
    doctor,
    inspect,
    predict,
    profile,
    profiles,
    recommend,
    report,
    tune,
    verify,
)
from advisor.cli.errors import guarded
from advisor.cli.options import state

app = typer.Typer(
    name="advisor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Which quantization, on this GPU, for this model, within these limits: "
    "measured, explained, reproducible.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"advisor {advisor.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Choose, search, make and verify the quantization of a language model."""


def _paragraphs(command: Callable[..., object]) -> str:
    """Return a command's docstring with each paragraph on one line, to be wrapped when shown."""
    text = introspection.cleandoc(command.__doc__ or "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


for _name, _command, _panel in (
    ("profile", profile.command, "Advice"),
    ("recommend", recommend.command, "Advice"),
    ("predict", predict.command, "Advice"),
    ("tune", tune.command, "Quantize"),
    ("apply", apply.command, "Quantize"),
    ("verify", verify.command, "Quantize"),
    ("report", report.command, "Quantize"),
    ("inspect", inspect.command, "Examine"),
    ("compare", compare.command, "Examine"),
    ("doctor", doctor.command, "Environment"),
    ("demo", demo.command, "Environment"),
):
    app.command(_name, rich_help_panel=_panel, help=_paragraphs(_command))(_command)
app.add_typer(profiles.app, name="profiles", rich_help_panel="Environment")
app.add_typer(backends.app, name="backends", rich_help_panel="Environment")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process.

    Args:
        arguments: What follows the command's name; by default what the process was given.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # What the options say is remembered when they are parsed; a usage error may come before that.
    state.json, state.verbose, state.debug = "--json" in given, False, "--debug" in given
    sys.exit(guarded(_run)(given))


def _run(arguments: list[str]) -> int:
    status = app(arguments, prog_name="advisor", standalone_mode=False)
    return status if isinstance(status, int) else 0
