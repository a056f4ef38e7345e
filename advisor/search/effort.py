"""How much a search spends on its answer: what it scores, how codes are made, what it measures.

Measured on SmolLM2-135M (32×256 calibration tokens, vLLM, the mixture at 118 MB; KL in nats on the
first 16 and on all 32 evaluation sequences, CPU seconds of its codes, on a busy machine):

    ranges, feedback among outputs, passes of descent    KL, 16    KL, 32    CPU s
    whole, none, 0                                       0.0403                 25
    whole, none, 3                                       0.0372                 47
    whole, 0.7, 0                                        0.0362    0.0368       37
    whole, 0.7, 3                                                  0.0336       89
    searched, 0.7, 0 (quick)                             0.0352    0.0360       32
    searched, 0.7, 1                                               0.0335       48
    searched, 0.7, 3 (full)                                        0.0326       83
    the same, blocks fitted in sequence (full)                     0.0315      184

What searches took in all is in the README ("What it costs").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from advisor.errors import InputError, did_you_mean
from advisor.methods.settings import QuantizationSettings
from advisor.search.families import BEST, USUAL_DAMPING, WEIGHT_METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.schemes import Scheme

_SCALE_STEPS = 8
"""AWQ's exponents tried: twenty cost two and a half times as much for the same scales."""
_OUTPUT_FEEDBACK = 0.7
_CLIP_STEPS = 10


@dataclass(frozen=True, slots=True)
class Effort:
    """One level.

    Attributes:
        name: As ``--effort`` takes it.
        methods: Families of integers that are scored.
        explores: Whether trials may have further settings scored (dampings, clip searches, numbers
            of samples, mixes, rotations), or choose among what is scored already. GPTQ's scores of
            a shallow model are made with and without a search of ranges in any case.
        descent: Passes of coordinate descent over the codes.
        sequential: Whether the answer is also fitted to the quantized blocks before each.
        every_type: Whether MXFP4 is an option beside NVFP4, whose 4.5 bits are the better ones, and
            the integers, that fill the sizes below; and symmetric integers in groups beside
            asymmetric ones, whose zero points save more than they take.
        every_uniform: Whether the best uniform candidate of each method and format is measured, or
            only the one that scores say is best.
        evaluation_sequences: Held-out sequences by default.
        compared_sequences: Of each text, to see how far the calibration stands for the evaluation.
    """

    name: Literal["quick", "full"]
    methods: tuple[str, ...]
    explores: bool
    descent: int
    sequential: bool
    every_type: bool
    every_uniform: bool
    evaluation_sequences: int
    compared_sequences: int

    @property
    def settings(self) -> QuantizationSettings:
        """The methods' settings that families refine."""
        return QuantizationSettings(
            scale_steps=_SCALE_STEPS, descent=self.descent, descent_damping=USUAL_DAMPING,
            output_feedback=_OUTPUT_FEEDBACK, clip_steps=_CLIP_STEPS,
        )  # fmt: skip

    def options(self, schemes: Sequence[Scheme]) -> tuple[Scheme, ...]:
        """Return what a mixture may take of what the engine mixes."""
        if self.every_type:
            return tuple(schemes)
        better = {_alike(scheme) for scheme in schemes}
        return tuple(scheme for scheme in schemes if not _worse(scheme) & better)


def _alike(scheme: Scheme) -> tuple[object, ...]:
    """Return all of a scheme but its method."""
    inputs = scheme.activation is not None
    return scheme.weight, scheme.granularity, scheme.group_size, scheme.symmetric, inputs


def _worse(scheme: Scheme) -> set[tuple[object, ...]]:
    """Return what makes a scheme superfluous."""
    if scheme.weight == "mxfp4":
        return {_alike(replace(scheme, weight="nvfp4"))}
    if scheme.is_integer and scheme.symmetric and scheme.granularity == "group":
        return {_alike(replace(scheme, symmetric=False))}
    return set()


FULL = Effort(
    "full", (*WEIGHT_METHODS, BEST), explores=True, descent=3, sequential=True, every_type=True,
    every_uniform=True, evaluation_sequences=32, compared_sequences=16,
)  # fmt: skip
QUICK = Effort(
    "quick", ("gptq",), explores=False, descent=0, sequential=False, every_type=False,
    every_uniform=False, evaluation_sequences=16, compared_sequences=6,
)  # fmt: skip
EFFORTS = (QUICK, FULL)


def effort_named(name: str) -> Effort:
    """Return a level.

    Raises:
        InputError: There is no such level.
    """
    for effort in EFFORTS:
        if effort.name == name:
            return effort
    names = [effort.name for effort in EFFORTS]
    raise InputError(
        f"--effort must be one of {', '.join(names)}, but got {name!r}.{did_you_mean(name, names)}"
    )
