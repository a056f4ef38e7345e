"""Coordinate descent for rows that make up for each other's errors (see ``coupled``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch

from advisor.methods.column_state import ColumnState
from advisor.methods.descent import damped_moment, descend
from advisor.methods.descent_steps import Couplings
from advisor.methods.outputs import far_apart, feedback_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from advisor.methods.gptq_columns import ColumnCodes
    from advisor.methods.settings import QuantizationSettings

DESCENT_ROWS, DESCENT_BLOCKS = 64, 4
"""The least rows of a block, and the most blocks of a linear: each is a loop over all columns.

Measured as in :func:`advisor.methods.outputs.far_apart`, with CPU seconds of all quantizing:
int4 g32 asym in 2, 3, 4, 8, 16 blocks 0.731, 0.692, 0.676, 0.656, 0.644 (2.5, 2.7, 2.6, 3.3,
5.1 s)."""


StateT = TypeVar("StateT", bound="RowState")


class RowState(Protocol):
    """Codes of a weight whose rows can be worked on apart."""

    def weight(self) -> Tensor:
        """Return the quantized weight, float32 [columns, rows]."""
        ...

    def rows(self: StateT, rows: Tensor) -> StateT:
        """Return a copy of some rows, int64."""
        ...

    def put(self: StateT, rows: Tensor, state: StateT) -> None:
        """Take up what some rows have become."""
        ...


def descend_coupled(
    columns: Tensor,
    found: ColumnCodes,
    bits: int,
    second_moment: Tensor,
    metrics: Sequence[Tensor],
    settings: QuantizationSettings,
) -> ColumnCodes:
    """Return better codes and scales for a weight, by tr(G ΔW H ΔWᵀ); zero points stay.

    Blocks of rows take turns: each descends as :func:`advisor.methods.descent.descend` does,
    towards its weights less what the errors of all other rows mean for it. Linears side by side
    take theirs together.

    Args:
        columns: W, float32 [columns, rows], groups of consecutive columns; not modified.
        found: Codes to start from; not modified.
        bits: Width of a code.
        second_moment: H, float32 [columns, columns], not damped.
        metrics: G of :func:`advisor.methods.outputs.output_metric` of each linear, float32 [rows of
            it, rows of it].
        settings: ``descent`` passes and their damping, rounding of scales.
    """
    state = ColumnState.of(found, bits)
    couplings = Couplings(damped_moment(second_moment, settings), len(found.scales))

    def descend_rows(target: Tensor, own: ColumnState) -> None:
        descend(target, own, couplings, settings, 1)

    take_turns(columns, state, metrics, settings.descent, descend_rows)
    return state.codes()


def take_turns(
    columns: Tensor,
    state: StateT,
    metrics: Sequence[Tensor],
    passes: int,
    descend_rows: Callable[[Tensor, StateT], None],
) -> None:
    """Let blocks of rows descend in turn, each making up for the errors of all others.

    Args:
        columns: W, float32 [columns, rows].
        state: What stands for W; changed.
        metrics: As :func:`descend_coupled` takes them.
        passes: Turns of each block.
        descend_rows: Lowers the error of some rows' state towards a target [columns, rows], once.
    """
    change = state.weight() - columns
    turns = _turns(metrics)
    for _ in range(passes):
        for parts in turns:
            rows = torch.cat([part.rows for part in parts])
            pull = [change[:, part.linear] @ part.feedback.t() for part in parts]
            own = state.rows(rows)
            descend_rows(columns[:, rows] - torch.cat(pull, 1), own)
            state.put(rows, own)
            change[:, rows] = own.weight() - columns[:, rows]


@dataclass(frozen=True, slots=True)
class _Part:
    """One linear's part of a turn.

    Attributes:
        linear: The linear's rows in the weight.
        rows: Those whose turn it is, int64.
        feedback: What the errors of the linear's rows mean for these, float32.
    """

    linear: slice
    rows: Tensor
    feedback: Tensor


def _turns(metrics: Sequence[Tensor]) -> list[list[_Part]]:
    """Return whose turn it is, in order."""
    turns: list[list[_Part]] = []
    first = 0
    for metric in metrics:
        height = len(metric)
        linear = slice(first, first + height)
        count = max(1, min(DESCENT_BLOCKS, height // DESCENT_ROWS))
        for turn, own in enumerate(far_apart(height, count)):
            if turn == len(turns):
                turns.append([])
            rows = torch.arange(first, first + height, device=metric.device)[own]
            turns[turn].append(_Part(linear, rows, feedback_of(metric, own)))
        first += height
    return turns
