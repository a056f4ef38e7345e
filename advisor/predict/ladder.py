"""How far a candidate can be driven: the largest context and the largest batch that fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.predict.memory import Serving, largest_batch, largest_context

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.candidate import Candidate, Workload

_FIRST = 3
"""Candidates that get a rung."""


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
