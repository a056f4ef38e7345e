"""Read tensors of a safetensors checkpoint, one file or sharded, without loading it whole."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from advisor.errors import InputError, join_errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_LENGTH_BYTES = 8
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint, in the order of its index.

    Raises:
        InputError: There is none (pickle files are refused), or the index names a missing one.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(
                f"{index} names files that are not there: {', '.join(missing)}. "
                "Download the model again."
            )
        return tuple(folder / name for name in names)
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    found = tuple(sorted(path for path in folder.glob("*.safetensors") if path.is_file()))
    if len(found) == 1:
        return found
    if found:
        raise InputError(f"{folder} has {len(found)} safetensors files but no {INDEX_FILE}.")
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise InputError(
            f"{folder} has only pickle weights ({', '.join(pickles[:3])}), which can run code when "
            "they are loaded. Convert them first: load the model in a place you trust and call "
            "model.save_pretrained(folder, safe_serialization=True)."
        )
    raise InputError(f"{folder} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}.")


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is as long as its header says.

    Raises:
        InputError: The file is truncated or is no safetensors file.
    """
    read_header(path)


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file and where its data begins, in bytes.

    Raises:
        InputError: The file is truncated or is no safetensors file.
    """
    size = path.stat().st_size
    advice = "Download or copy the file again."
    with path.open("rb") as handle:
        head = handle.read(_LENGTH_BYTES)
        if len(head) < _LENGTH_BYTES:
            raise InputError(f"{path} is truncated: {size} bytes. {advice}")
        (length,) = struct.unpack("<Q", head)
        if length > size - _LENGTH_BYTES:
            raise InputError(f"{path} is truncated inside its header: {size} bytes. {advice}")
        try:
            header: dict[str, Any] = json.loads(handle.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key[:2] != "__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is no safetensors file: its header is broken.") from error
    expected = _LENGTH_BYTES + length + max(ends, default=0)
    if size < expected:
        raise InputError(f"{path} is truncated: {size} bytes, expected {expected}. {advice}")
    return header, _LENGTH_BYTES + length


def check_weight_files(folder: Path) -> None:
    """Check every weight file of a checkpoint; all damaged ones are listed.

    Raises:
        InputError: A file is missing, a pickle, or truncated.
    """
    problems = []
    for path in weight_files(folder):
        try:
            check_safetensors(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(join_errors(problems))


def tensor_names(folder: Path) -> tuple[str, ...]:
    """Return the names of all stored tensors, file by file."""
    names: list[str] = []
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            names.extend(handle.keys())
    return tuple(names)


def read_tensor(folder: Path, name: str) -> Tensor:
    """Return one stored tensor, in its stored data type.

    Raises:
        InputError: There is no tensor of that name.
    """
    index = folder / INDEX_FILE
    paths = weight_files(folder)
    if index.is_file() and name in (mapping := _weight_map(index)):
        paths = (folder / mapping[name],)
    for path in paths:
        with safe_open(str(path), framework="pt") as handle:
            if name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                tensor: Tensor = handle.get_tensor(name)
                return tensor
    raise InputError(f"{folder} has no tensor named {name!r}.")


def iterate_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every stored tensor with its name; one is in memory at a time (memory-mapped)."""
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                yield name, handle.get_tensor(name)


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name to file name of a sharded checkpoint."""
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
        mapping = {str(name): str(file) for name, file in document["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no index of a safetensors checkpoint.") from error
    outside = sorted({file for file in mapping.values() if Path(file).name != file})
    if outside:
        raise InputError(f"{index} names files outside its folder: {', '.join(outside)}.")
    return mapping
