"""Quantized weights of a whole model on disk: memory holds those that are asked for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from advisor.errors import AdvisorError
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from advisor.schemes import Scheme

_FIELDS = ("codes", "scales", "zero_points", "group_index", "codebook")
_EXTRA = "extras/"


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class SpilledWeights(Mapping[str, QuantizedWeight]):
    """Quantized weights by module path, in a file that vanishes with this object or its process.

    A weight that is read is a new one each time, equal to the one that was added to the bit.
    """

    def __init__(self, folder: Path) -> None:
        """Make the file.

        Args:
            folder: Where; made if missing. The file has no name in it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives with this object
        self._index: dict[str, tuple[Scheme, dict[str, _Place]]] = {}
        self._end = 0

    def add(self, name: str, weight: QuantizedWeight) -> None:
        """Write a weight to the file."""
        tensors = {field: getattr(weight, field) for field in _FIELDS}
        tensors |= {f"{_EXTRA}{key}": value for key, value in weight.extras.items()}
        places = {key: self._write(value) for key, value in tensors.items() if value is not None}
        self._index[name] = (weight.scheme, places)

    def _write(self, tensor: Tensor) -> _Place:
        values = tensor.detach().cpu().contiguous()
        place = _Place(self._end, values.dtype, values.shape)
        self._file.seek(self._end)
        # Not every type has a numpy twin; their bytes do.
        self._file.write(values.flatten().view(torch.uint8).numpy().data)
        self._end += place.nbytes
        return place

    def _read(self, place: _Place) -> Tensor:
        if place.nbytes == 0:
            return torch.empty(place.shape, dtype=place.dtype)
        self._file.flush()
        content = bytearray(place.nbytes)
        if os.preadv(self._file.fileno(), [content], place.offset) != place.nbytes:
            raise AdvisorError("quantized weights kept on disk are gone: is the disk full?")
        return torch.frombuffer(content, dtype=place.dtype).view(place.shape)

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read a weight from the file."""
        scheme, places = self._index[name]
        found = {key: self._read(place) for key, place in places.items()}
        extras = {
            key.removeprefix(_EXTRA): value
            for key, value in found.items()
            if key.startswith(_EXTRA)
        }
        fields = {key: value for key, value in found.items() if not key.startswith(_EXTRA)}
        return QuantizedWeight(scheme=scheme, extras=extras, **fields)

    def __iter__(self) -> Iterator[str]:
        """Go over the names, in the order that they were added in."""
        return iter(self._index)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self._index)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return self._end
