"""Safetensors headers: names, data types and shapes without reading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

_LIMIT_BYTES = 100_000_000
"""The format's own limit on a header; more means a file that is not safetensors."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header.

    Attributes:
        dtype: The format's name, for example ``BF16``.
        shape: Shape, as stored.
        size_bytes: Bytes of its data.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header.

    Raises:
        InputError: The file is truncated or is not safetensors.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            total = path.stat().st_size
            if not 2 <= length <= min(_LIMIT_BYTES, max(0, total - 8)):
                raise _broken(path, f"its header claims {length} bytes of {total}")
            text = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    tensors = parse_header(text, str(path))
    data_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    if data_bytes > total - 8 - length:
        raise _broken(
            path, f"its tensors need {data_bytes} bytes and {total - 8 - length} are there"
        )
    return tensors


def parse_header(text: bytes, where: str) -> dict[str, StoredTensor]:
    """Parse the JSON of a header.

    Raises:
        InputError: It is not a safetensors header.
    """
    try:
        entries: Mapping[str, Any] = json.loads(text)
        return {
            name: StoredTensor(
                entry["dtype"],
                tuple(int(size) for size in entry["shape"]),
                int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _broken(Path(where), f"its header is not valid ({error})") from error


def read_folder_headers(folder: Path) -> dict[str, StoredTensor]:
    """Read the headers of every safetensors file of a model folder, empty where there is none.

    Raises:
        InputError: A file is broken, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in indexed_files(index.read_bytes(), str(index))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InputError(
                f"{index} names {len(missing)} files that are not there: {', '.join(missing[:3])}. "
                "Download the model again."
            )
    elif (folder / "model.safetensors").is_file():
        # What lies beside it (an adapter, the same weights in the authors' own format) is not read.
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    tensors: dict[str, StoredTensor] = {}
    for path in files:
        tensors.update(read_header(path))
    return tensors


def indexed_files(text: bytes, where: str) -> list[str]:
    """Return the file names of a sharded checkpoint's index, sorted.

    Raises:
        InputError: It is not an index, or a name leaves the folder.
    """
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{where} is not a safetensors index ({error}). Download it again."
        ) from error
    if unsafe := [name for name in names if Path(name).name != name]:
        raise InputError(f"{where} names files outside its folder: {', '.join(unsafe[:3])}.")
    return names


def _broken(path: Path, what: str) -> InputError:
    return InputError(f"{path} is truncated or not a safetensors file: {what}. Download it again.")
