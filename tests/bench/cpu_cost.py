"""What a piece of work costs: CPU seconds of this process and of the ones it started.

Wall times depend on what else the machine does; user and system time of one thread nearly do not.
"""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True)
class Cost:
    """CPU seconds, user and system; 0 until the work is done."""

    cpu_s: float = 0.0


@contextmanager
def cost() -> Iterator[Cost]:
    """Measure what happens inside; children count once they have ended."""
    found = Cost()
    start = _cpu_seconds()
    try:
        yield found
    finally:
        found.cpu_s = _cpu_seconds() - start


def one_thread() -> None:
    """Hold torch, and the processes started from here, to one thread."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    import torch

    torch.set_num_threads(1)


def _cpu_seconds() -> float:
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, kinds))
