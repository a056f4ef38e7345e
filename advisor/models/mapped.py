"""Weight files mapped into memory: 16-bit weights cost address space, not memory.

The kernel reads a page when it is first used and may drop it at any time, as it is on disk
already. :meth:`MappedWeights.release` drops pages at once, so that a process that goes through a
model block by block has one block's pages resident and not all that it ever touched.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any

import torch

from advisor.models.checkpoint import read_header, weight_files

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_PAGE = mmap.PAGESIZE


class MappedWeights:
    """The tensors of a safetensors checkpoint, as views of its files.

    A tensor that is written to gets copies of its pages, private to this process; files never
    change. Files must not be truncated while they are mapped.

    Attributes:
        tensors: By stored name, in the stored data type and shape.
    """

    def __init__(self, folder: Path) -> None:
        """Map every weight file of a folder.

        Raises:
            InputError: A file is missing or truncated, or holds no safetensors.
            ValueError: A tensor has a data type that torch cannot view.
        """
        self.tensors: dict[str, Tensor] = {}
        self._spans: dict[int, tuple[mmap.mmap, int, int]] = {}
        for path in weight_files(folder):
            header, start = read_header(path)
            mapping = _map(path)
            for name, entry in header.items():
                if name != "__metadata__":
                    self._add(name, entry, mapping, start)

    def _add(self, name: str, entry: dict[str, Any], mapping: mmap.mmap, start: int) -> None:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"{name} is stored as {entry['dtype']}")
        shape = torch.Size(entry["shape"])
        if shape.numel() == 0:
            self.tensors[name] = torch.empty(shape, dtype=dtype)
            return
        first, last = (start + int(offset) for offset in entry["data_offsets"])
        if last - first != shape.numel() * dtype.itemsize:
            raise ValueError(f"{name} has {last - first} bytes for shape {list(shape)}")
        if first % dtype.itemsize:
            raise ValueError(f"{name} is not aligned to its data type")
        tensor = torch.frombuffer(mapping, dtype=dtype, count=shape.numel(), offset=first)
        self.tensors[name] = tensor.view(shape)
        self._spans[tensor.data_ptr()] = (mapping, first, last)

    def release(self, tensor: Tensor, start_bytes: int = 0, stop_bytes: int | None = None) -> None:
        """Drop a tensor's pages from memory; they are read again when they are used.

        What was written to the tensor is lost, so only release what was not. A tensor that is
        no mapped one as a whole is left alone.

        Args:
            tensor: Its pages, or with the other arguments some of them.
            start_bytes: Offset of the first byte to drop.
            stop_bytes: Offset after the last.
        """
        found = self._spans.get(tensor.data_ptr())
        if found is None or not hasattr(mmap, "MADV_DONTNEED"):
            return
        mapping, first, last = found
        if stop_bytes is not None:
            last = first + stop_bytes
        first += start_bytes
        # Pages that a neighbour shares stay.
        start = -(-first // _PAGE) * _PAGE
        length = last // _PAGE * _PAGE - start
        if length > 0:
            mapping.madvise(mmap.MADV_DONTNEED, start, length)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedWeights:
        """Return itself: copied tensors are no longer mapped, and files cannot be copied."""
        return self


def _map(path: Path) -> mmap.mmap:
    """Return a private mapping of a file, which need not fit into memory."""
    with path.open("rb") as handle:
        if hasattr(mmap, "MAP_PRIVATE"):
            # Private and writable, as torch wants memory that could be written; no room is set
            # aside for copies of pages, which would refuse models larger than memory.
            flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(handle.fileno(), 0, flags=flags, prot=protection)
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
