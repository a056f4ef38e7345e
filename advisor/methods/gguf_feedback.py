"""GGUF's codes and fields chosen so that inputs, and outputs, make up for each other's errors.

llama.cpp rounds every weight to the nearest code, with fields fitted to an importance of each
input: to the diagonal of H. But a file holds any codes and fields, so that what GPTQ and
coordinate descent do for integers serves here as well: fields are fitted as before, then codes are
chosen column by column in activation order (which no file shows, as fields are known beforehand),
then codes and fields are improved in turn (:mod:`advisor.methods.gguf_descent`). With gradients,
rows make up for each other's errors, too (:mod:`advisor.methods.coupled`).

Measured on the small trained model (all linears of one type, embedding in 16 bits; 32×256
calibration and 32×256 held-out tokens of the built-in text; damping 0.05), KL in nats per token:
fields and codes by importance alone, codes by columns, then three passes of descent, then with
feedback among outputs (0.7) as well:

    q2_k     0.0658     0.0344     0.0199     0.0164
    q3_k     0.0182     0.0066     0.0049     0.0039
    q4_0     0.00572    0.00170    0.00153    0.00115
    iq4_nl   0.00414    0.00135    0.00120    0.00094
    q4_k     0.00381    0.00128    0.00115    0.00091
    q6_k     0.000215   0.000075   0.000070   0.000053
    q8_0     0.000023   0.000009   0.000008   0.000007

SmolLM2-135M (re-parameterised), all linears q4_0, embedding in 16 bits, as many tokens: 0.1586
[0.1531, 0.1642] by importance alone, 0.0408 [0.0379, 0.0438] with all of it, whose codes took 103 s
of CPU (10 s by importance alone; one thread).

Layer errors on other held-out tokens, over those of importance alone (geometric means over the
linears): 0.14 to 0.29 by columns, 0.13 to 0.16 after descent. Six passes instead of three gave 0.98
to 1.00 of the last column (five types).

Reference: GPTQ, arXiv:2210.17323, Algorithm 1; OBC, arXiv:2208.11580; CDQuant, arXiv:2406.17542,
section 3; YAQA, arXiv:2505.22988, section 4.
Differs from the papers: fields of blocks instead of one scale, and they move, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.methods.coupled import quantize_coupled
from advisor.methods.coupled_descent import take_turns
from advisor.methods.descent_steps import Couplings
from advisor.methods.feedback import Feedback
from advisor.methods.gguf_descent import descend_blocks
from advisor.methods.gguf_state import choose_in_order
from advisor.methods.gptq_columns import ColumnGrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.methods.gguf_state import BlockState


class BlockFeedback(Feedback):
    """Feedback onto the block types of GGUF."""

    def improve(self, values: Tensor, states: Sequence[BlockState]) -> None:
        """Choose codes anew for the fields of each state, then better fields and codes.

        Args:
            values: W, float32 [out, in], or some of its rows if they are independent; not modified.
            states: Of W, in one block type each; changed.
        """
        columns = values.t().contiguous()
        if not self.couples:
            choose_in_order(columns, states, self.factor, self.order)
        for state in states:
            if self.couples:
                self._choose_coupled(columns, state)
            if self.settings.descent:
                self._descend(columns, state)

    def _choose_coupled(self, columns: Tensor, state: BlockState) -> None:
        """Choose codes by the wave front of rows and columns; fields stay."""
        found = quantize_coupled(
            state.shifted(columns), self.factor,
            ColumnGrid(state.kind.bits, state.kind.width, symmetric=False), self.settings,
            self.importance, self.metrics, self.order, state.codes,
        )  # fmt: skip
        state.codes.steps = found.codes.float() + state.codes.low[0]

    def _descend(self, columns: Tensor, state: BlockState) -> None:
        couplings = Couplings(self.damped, len(state.s))
        passes = self.settings.descent
        if not self.couples:
            descend_blocks(columns, state, couplings, passes)
            return

        def descend_rows(target: Tensor, own: BlockState) -> None:
            descend_blocks(target, own, couplings, 1)

        take_turns(columns, state, self.metrics, passes, descend_rows)
