"""Read config.json and its like."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model's folder.

    Raises:
        InputError: The folder or the file is missing or broken.
    """
    if not folder.exists():
        raise InputError(f"model folder {folder} does not exist.")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder that holds config.json.")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder} has no config.json: it is no Hugging Face model folder.")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """Return a file's JSON object.

    Raises:
        InputError: It holds something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON: {error}. Download or write it again."
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{path} must hold a JSON object, but holds {type(config).__name__}.")
    return config
