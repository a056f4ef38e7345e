"""What the oldest supported Python needs of the options."""

import types
import typing

import pytest

from advisor.cli import options


def _callbacks():
    for name, value in vars(options).items():
        for extra in getattr(value, "__metadata__", ()):
            if getattr(extra, "callback", None) is not None:
                yield pytest.param(extra.callback, id=name)


def test_there_are_callbacks():
    assert len(list(_callbacks())) >= 4


@pytest.mark.parametrize("callback", _callbacks())
def test_no_callback_takes_a_parametrised_container(callback):
    """On Python 3.10 ``list[Path]`` is an instance of type, and Typer fails at every command."""
    hints = typing.get_type_hints(callback)
    assert not [hint for hint in hints.values() if isinstance(hint, types.GenericAlias)]
