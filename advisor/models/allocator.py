"""Memory that tensors no longer use goes back to the system.

glibc puts a tensor of up to 32 MB into its heap once one as large has been freed, and keeps the
heap: among activations and logits that come and go it grows to several times what is in use
(measured on a vocabulary of 49152: logits of 128 tokens, a forward and a backward at a time, left
170 MB behind them, those of 256 tokens, too large for the heap, 2 MB). So large tensors are mapped
one by one, and what the heap has kept of the others is given back where a stage ends.

Elsewhere than on glibc nothing is done here.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

LARGE_BYTES = 8 << 20
"""Tensors of at least this size get pages of their own, which the system must clear first: 1 us
for 4 kB, little beside what is computed with them."""
_KEPT_BYTES = 64 << 20
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@functools.cache
def _library() -> Any:
    """Return the C library where it is glibc, else None."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    needed = ("malloc_trim", "mallopt", "gnu_get_libc_version")
    return library if all(hasattr(library, name) for name in needed) else None


@functools.cache
def map_large_tensors() -> None:
    """Let this process map its large tensors one by one from now on."""
    library = _library()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        # Setting one of the two ends the adjustment of both.
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def drop_pages(*tensors: Tensor) -> None:
    """Let the pages of a file that contiguous tensors are shared views of leave memory.

    What was written to them is in the file, from which they are read when they are used again.
    Never call it for memory that is no such view: what lies there would be lost.
    """
    library = _library()
    if library is None or not hasattr(mmap, "MADV_DONTNEED"):
        return
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.nbytes == 0:  # no address of this process
            continue
        first = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        length = tensor.data_ptr() + tensor.nbytes - first
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def give_back() -> None:
    """Give the heap's unused pages back; they are cleared again when they are used again."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)
