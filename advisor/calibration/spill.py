"""Hidden states between blocks, memory-mapped, so that memory stays flat as blocks are added."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class Spill:
    """A tensor of shape [sequences, length, hidden] in a file that appears when it is whole."""

    def __init__(self, folder: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Name the tensor; nothing is opened.

        Args:
            folder: Where the file goes; made if missing.
            name: Name of the file.
            shape: Shape of the tensor.
            dtype: Its data type.
        """
        self._path = folder / name
        self._temporary = folder / f".{name}.{os.getpid()}"
        self._shape = shape
        self._dtype = dtype

    @property
    def exists(self) -> bool:
        """Whether a whole tensor is there."""
        expected = torch.Size(self._shape).numel() * self._dtype.itemsize
        return self._path.is_file() and self._path.stat().st_size == expected

    def create(self) -> Tensor:
        """Return a writable tensor, to be filled before :meth:`publish`."""
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        return self._map(self._temporary)

    def publish(self) -> None:
        """Give the filled tensor its name."""
        self._temporary.replace(self._path)

    def open(self) -> Tensor:
        """Return the tensor; it is read as it is used and must not be written."""
        return self._map(self._path)

    def delete(self) -> None:
        """Remove the file, if it is there."""
        self._path.unlink(missing_ok=True)

    def _map(self, path: Path) -> Tensor:
        size = torch.Size(self._shape).numel()
        flat = torch.from_file(str(path), shared=True, size=size, dtype=self._dtype)
        return flat.view(self._shape)
