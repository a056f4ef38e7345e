"""How far a candidate can be driven: the largest context and the largest batch that fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.predict.memory import Serving, serving_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.candidate import Candidate, Workload
    from advisor.predict.size import SizeEstimate

_FIRST = 3
"""Candidates that get a rung."""
_UNKNOWN_CONTEXT = 1 << 20
_MOST_SEQUENCES = 4096
"""Where the searches for the largest context and batch stop."""


@dataclass(frozen=True, slots=True)
class Rung:
    """What one candidate leaves room for.

    Attributes:
        candidate: Name of the scheme.
        limit_bytes: Memory of each device that may be used.
        largest_context: Tokens of one sequence (batch 1); 0 where none fits.
        whole_context: Whether that is all the model was made for.
        context: The context asked for.
        largest_batch: Sequences of that context; 0 where none fits, 4096 at most.
    """

    candidate: str
    limit_bytes: int
    largest_context: int
    whole_context: bool
    context: int
    largest_batch: int

    def to_dict(self) -> dict[str, Any]:
        """Return the rung for JSON."""
        return {
            "candidate": self.candidate,
            "limit_bytes": self.limit_bytes,
            "largest_context_at_batch_1": self.largest_context,
            "whole_context": self.whole_context,
            "context": self.context,
            "largest_batch_at_context": self.largest_batch,
        }


def ladder(
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    ranked: Sequence[Candidate],
    workload: Workload,
    limit_bytes: int | None,
) -> tuple[Rung, ...]:
    """Return a rung for each of the first feasible candidates.

    Args:
        spec: The model.
        hardware: The device.
        engine: Name of the engine.
        ranked: Candidates in rank order.
        workload: Context and batch asked for.
        limit_bytes: Memory of each device that may be used; None = not known, no rungs.
    """
    if limit_bytes is None:
        return ()
    serving = Serving(
        engine,
        tensor_parallel=hardware.count if hardware.kind == "gpu" else 1,
        device=hardware.kind,
    )
    rungs = []
    for candidate in [c for c in ranked if c.feasible][:_FIRST]:
        if candidate.size is None:  # nothing feasible is without, but its type allows it
            continue
        most = largest_context(spec, candidate.size, serving, limit_bytes)
        batch = largest_batch(spec, candidate.size, serving, limit_bytes, workload.context)
        whole = spec.longest_context is not None and most >= spec.longest_context
        rungs.append(Rung(candidate.name, limit_bytes, most, whole, workload.context, batch))
    return tuple(rungs)


def largest_context(
    spec: ModelSpec,
    size: SizeEstimate,
    engine: str | Serving,
    limit_bytes: int,
    batch: int = 1,
) -> int:
    """Return the largest context that fits a memory limit, 0 where none does.

    It is at most what the model was made for (``max_position_embeddings``).
    """
    most = spec.longest_context or _UNKNOWN_CONTEXT
    return _largest(
        lambda context: serving_memory(spec, size, engine, context, batch).total <= limit_bytes,
        most,
    )


def largest_batch(
    spec: ModelSpec,
    size: SizeEstimate,
    engine: str | Serving,
    limit_bytes: int,
    context: int,
) -> int:
    """Return the largest batch that fits a memory limit, 0 where none does (4096 at most)."""
    return _largest(
        lambda batch: serving_memory(spec, size, engine, context, batch).total <= limit_bytes,
        _MOST_SEQUENCES,
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest number up to ``most`` that fits; what fits is monotone."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
