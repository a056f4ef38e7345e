"""The checkpoint formats by name, imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from advisor.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from advisor.formats.base import CheckpointFormat
    from advisor.schemes import Scheme

_MODULES: dict[str, str] = {
    "gptq": "advisor.formats.gptq",
    "awq": "advisor.formats.awq",
    "compressed-tensors": "advisor.formats.compressed_tensors",
    "bitsandbytes": "advisor.formats.bitsandbytes",
    "gguf": "advisor.formats.gguf",
    "hqq": "advisor.formats.hqq",
    "safetensors": "advisor.formats.plain",
}
_READ_ONLY: dict[str, str] = {
    "fp8": "advisor.formats.fp8",
    "modelopt": "advisor.formats.modelopt",
}
"""Formats of other tools, to be examined and compared."""


def format_names() -> tuple[str, ...]:
    """Return the names of the formats that Advisor writes, without importing them."""
    return tuple(_MODULES)


def readable_names() -> tuple[str, ...]:
    """Return the names of the formats that Advisor reads."""
    return (*_MODULES, *_READ_ONLY)


def get_format(name: str) -> CheckpointFormat:
    """Import and return a format.

    Raises:
        InputError: Unknown; names the nearest known one.
    """
    modules = _MODULES | _READ_ONLY
    if name not in modules:
        known = ", ".join(_MODULES)
        raise InputError(
            f"unknown format {name!r}: use one of {known}.{did_you_mean(name, _MODULES)}"
        )
    return cast("CheckpointFormat", importlib.import_module(modules[name]))


def storage_scheme(scheme: Scheme, format: str) -> Scheme:
    """Return the scheme that a checkpoint of this format is read back as.

    A checkpoint says how codes are stored, not how they were chosen: a GPTQ weight and a rounded
    one look the same. Comparing a plan with a checkpoint means comparing this with what
    :func:`advisor.formats.read.read_checkpoint` finds.
    """
    return get_format(format).storage_scheme(scheme)
