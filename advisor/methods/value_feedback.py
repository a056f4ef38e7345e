"""Codes of small tables, chosen so that inputs, and outputs, make up for each other's errors.

A table of values (E2M1, E4M3, NF4, FP4) times a scale per group of consecutive inputs: a checkpoint
holds any codes, so that what GPTQ and coordinate descent do for integers serves here as well.
Scales are chosen beforehand, then codes column by column in activation order (which no checkpoint
shows, as scales are known), then codes and scales are improved in turn, scales as far as the type
can store others. With gradients, rows make up for each other's errors, too
(:mod:`advisor.methods.coupled`).

Measured on the small trained model (all linears of one type, embedding in 16 bits; scales with clip
search; 32×256 calibration and 32×256 held-out tokens of the built-in text; damping 0.05), KL in
nats per token: nearest codes for scales weighted by H's diagonal, codes by columns, then three
passes of descent, then with feedback among outputs (0.7) as well:

    nvfp4        0.00640    0.00201    0.00169    0.00128
    mxfp4        0.01164    0.00303    0.00270    0.00198
    mxfp8        0.000631   0.000150   0.000126   0.000091
    bnb-nf4      0.00774    0.00190    0.00163    0.00117
    bnb-nf4-dq   0.00776    0.00194    0.00169    0.00128
    bnb-fp4      0.01412    0.00336    0.00279    0.00212

(The first of NF4 and FP4 has bitsandbytes' own scales. Without clip search bnb-nf4 gave 0.00184,
0.00167, 0.00127.) Layer errors on the held-out tokens, over those of the nearest codes (geometric
means over the linears): 0.11 to 0.19 by columns, 0.07 to 0.14 after descent, and 0.56 by columns at
most of any linear.

SmolLM2-135M, the same numbers of tokens, descent and feedback among outputs: uniform nvfp4 0.0391,
mxfp4 0.0726.

Reference: GPTQ, arXiv:2210.17323, Algorithm 1; CDQuant, arXiv:2406.17542, section 3; YAQA,
arXiv:2505.22988, section 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.methods.column_state import ColumnState
from advisor.methods.coupled import choose_coupled
from advisor.methods.coupled_descent import take_turns
from advisor.methods.descent import descend
from advisor.methods.descent_steps import Couplings
from advisor.methods.feedback import Feedback
from advisor.methods.gptq_float import quantize_in_turn
from advisor.numerics.nearest import Nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from advisor.methods.column_state import Rounding

_BLOCK = 32
"""Columns of the loop whose updates go one by one."""
_WEIGHTS_AT_ONCE = 1 << 21
"""Of which the codes are chosen together, where rows are independent."""
_SEARCHED_AT_ONCE = 1 << 15
"""Weights whose scales are searched together: few enough for a core's cache."""


class FixedScales:
    """Scales that cannot move."""

    def round_scales(self, scales: Tensor) -> Tensor:
        """Return no scales."""
        return torch.full_like(scales, torch.nan)


class ValueFeedback(Feedback):
    """Feedback onto a table of values."""

    def improve(
        self, values: Tensor, scales: Tensor, table: Tensor, rounding: Rounding
    ) -> tuple[Tensor, Tensor]:
        """Choose codes for scales, then better codes and scales.

        Args:
            values: W of all linears, one below the other, float32 [out, in]; not modified.
            scales: float32 [out, groups], not zero; not modified.
            table: The values that there are, rising, float32.
            rounding: Of the scales.

        Returns:
            Indices into the table, uint8 [out, in], and scales, float32 [out, groups].
        """
        rows = len(values) if self.couples else max(1, _WEIGHTS_AT_ONCE // values.shape[1])
        nearest = Nearest(table)
        indices, found = [], []
        for part, own in zip(torch.split(values, rows), torch.split(scales, rows), strict=True):
            state = self._choose(part.t().contiguous(), own.t().contiguous(), table, rounding)
            indices.append(nearest.indices(state.steps.t().contiguous()).to(torch.uint8))
            found.append(state.scales.t())
        return torch.cat(indices), torch.cat(found).contiguous()

    def _choose(
        self, columns: Tensor, scales: Tensor, table: Tensor, rounding: Rounding
    ) -> ColumnState:
        """Work on some rows, inputs first."""
        low, high = (torch.full_like(scales, float(edge)) for edge in (table[0], table[-1]))
        none_yet = columns.new_zeros(()).expand_as(columns)  # takes no memory
        state = ColumnState(none_yet, scales, low, high, table)
        settings = self.settings
        if self.couples:
            state.steps = choose_coupled(
                columns, self.factor, state, settings, self.metrics, self.order
            )
        else:
            state.steps = _in_order(columns, state, table, self.factor, self.order)
        couplings = Couplings(self.damped, len(scales))

        def descend_rows(target: Tensor, own: ColumnState) -> None:
            descend(target, own, couplings, rounding, 1)

        if self.couples:
            take_turns(columns, state, self.metrics, settings.descent, descend_rows)
        else:
            descend(columns, state, couplings, rounding, settings.descent)
        return state


def _in_order(
    columns: Tensor, state: ColumnState, table: Tensor, factor: Tensor, order: Tensor
) -> Tensor:
    """Return the steps that GPTQ's column loop chooses, float32 [columns, rows]."""
    scales = state.scales[order // (len(columns) // len(state.scales))]
    places = Nearest(table)

    def nearest(column: Tensor, index: int) -> tuple[Tensor, Tensor]:
        chosen = places.indices(column / scales[index])
        return chosen.to(torch.uint8), table[chosen] * scales[index]

    found = quantize_in_turn(columns[order], nearest, factor, _BLOCK)
    return table[found[torch.argsort(order)].long()].contiguous()


def least_error(
    groups: Tensor,
    candidates: Sequence[Tensor],
    rounded: Callable[[Tensor], Tensor],
    importance: Tensor | None,
) -> Tensor:
    """Return, per group, the first scale of least (weighted) squared error.

    Args:
        groups: Weights, float32 [out, groups, width]; not modified.
        candidates: Scales, float32 [out, groups] each.
        rounded: From weights over their scale to the nearest values of the table.
        importance: Weight of each input's squared error, float32 [groups, width]; or None.
    """
    if len(candidates) == 1:
        return candidates[0]
    rows = max(1, _SEARCHED_AT_ONCE // groups[0].numel())
    parts = zip(torch.split(groups, rows), *(torch.split(c, rows) for c in candidates), strict=True)
    return torch.cat([_least_error(part, own, rounded, importance) for part, *own in parts])


def _least_error(
    groups: Tensor,
    candidates: Sequence[Tensor],
    rounded: Callable[[Tensor], Tensor],
    importance: Tensor | None,
) -> Tensor:
    """Do so for a few rows."""
    best = candidates[0]
    least: Tensor | None = None
    for scales in candidates:
        spread = scales.unsqueeze(-1)
        error = rounded(groups / spread).mul_(spread).sub_(groups).square_()
        found = (error if importance is None else error.mul_(importance)).sum(-1)
        if least is None:
            least = found
            continue
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, scales, best)
    return best
