"""Experts of a mixture see only the tokens routed to them: how many, and what helps where too few.

A second moment of fewer rows than inputs is singular, and codes fitted to it can be worse than
plain rounding. Such an expert is fitted as if it had also seen half as many average tokens of its
layer as it has inputs.

Measured on a small trained mixture (Qwen3-MoE, 3 layers of 16 experts, 2 per token, hidden 128,
intermediate 64, trained on the built-in text; GPTQ int4 g32; error tr(ΔW H ΔWᵀ) on held-out tokens
of each expert over that of rounding, geometric mean of 36 experts), by tokens seen:

    gate and up, 128 inputs      8     32    128    256    512
    own tokens alone           0.98   0.86   0.51   0.40   0.35
    the layer's alone          0.45   0.45   0.45   0.45   0.45
    own and 32 of the layer's  0.44   0.43   0.39   0.36   0.34

    down, 64 inputs              8     32    128    256    512
    own tokens alone           1.64   1.55   0.70   0.59   0.55
    the layer's alone          0.94   0.94   0.94   0.94   0.94
    own and 32 of the layer's  0.88   0.80   0.67   0.61   0.57

The mixture of both is best, or within a few percent of it, up to about four tokens per input;
beyond, an expert's own are as good. At int3 the picture is the same.
"""

from __future__ import annotations

import statistics as numbers
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.statistics import LayerStatistics
    from advisor.modelspec import LinearSpec

ENOUGH_TOKENS_PER_INPUT = 4


@dataclass(frozen=True, slots=True)
class ExpertCoverage:
    """How many calibration tokens the experts of a model saw.

    Attributes:
        layers: Path of a layer's experts -> tokens that each of them saw, in their order.
        helped: Experts that were fitted with the help of their layer's average tokens.
    """

    layers: dict[str, tuple[int, ...]]
    helped: int

    @property
    def counts(self) -> list[int]:
        """Tokens of every expert of every layer."""
        return [count for counts in self.layers.values() for count in counts]

    @property
    def unseen(self) -> int:
        """Experts that no calibration token was routed to."""
        return self.counts.count(0)

    @property
    def median(self) -> int:
        """Median of the tokens of an expert."""
        return int(numbers.median(self.counts))


class FittedStatistics:
    """What codes are fitted to: a linear's own sums, and what helps rarely used experts."""

    def __init__(self, store: Statistics, linears: Sequence[LinearSpec]) -> None:
        """Remember which experts share a layer.

        Args:
            store: Complete statistics.
            linears: Every linear of the model.
        """
        self._store = store
        self._siblings: dict[tuple[str, str], dict[str, LinearSpec]] = {}
        for linear in linears:
            if linear.is_expert:
                members = self._siblings.setdefault(kind_of_expert(linear), {})
                members.setdefault(linear.input_group, linear)
        self._pooled: tuple[object, LayerStatistics] | None = None

    def layer(self, linear: LinearSpec, samples: int | None = None) -> LayerStatistics:
        """Return what a linear's codes are fitted to, without gradients."""
        own = self._store.layer(linear, samples, gradients=False)
        return self.helped(own, linear, samples)

    def helped(
        self, own: LayerStatistics, linear: LinearSpec, samples: int | None = None
    ) -> LayerStatistics:
        """Return statistics with average tokens of the layer added, where an expert saw too few.

        Args:
            own: The linear's own.
            linear: Which one.
            samples: Prefix of the calibration sequences that the average is taken over.
        """
        if not linear.is_expert or own.tokens >= ENOUGH_TOKENS_PER_INPUT * linear.in_features:
            return own
        pooled = self._pool(linear, samples)
        if not pooled.tokens:
            return own
        added = max(1, linear.in_features // 2)
        share = added / pooled.tokens
        # Tokens may count by their gradients; those that are added count as the expert's own.
        each = own.rows / own.tokens if own.tokens else pooled.rows / pooled.tokens
        weight = added * each
        factor = weight / pooled.rows if pooled.rows > 0 else 0.0
        return replace(
            own,
            tokens=own.tokens + added,
            second_moment=own.second_moment + factor * pooled.second_moment,
            moment_weight=None if own.moment_weight is None else own.rows + weight,
            absolute_maximum=torch.maximum(own.absolute_maximum, pooled.absolute_maximum),
            absolute_sum=own.absolute_sum + share * pooled.absolute_sum,
        )

    def _pool(self, linear: LinearSpec, samples: int | None) -> LayerStatistics:
        """Return the sums over all experts of a layer; the last ones are remembered."""
        key = (kind_of_expert(linear), samples)
        if self._pooled is None or self._pooled[0] != key:
            total: LayerStatistics | None = None
            for member in self._siblings[kind_of_expert(linear)].values():
                found = self._store.layer(member, samples, gradients=False)
                total = found if total is None else _sum(total, found)
            if total is None:
                raise KeyError(linear.name)
            self._pooled = key, total
        return self._pooled[1]


def expert_coverage(
    store: Statistics, linears: Sequence[LinearSpec], samples: int | None = None
) -> ExpertCoverage | None:
    """Return how many tokens each expert saw; None where the model has no experts.

    Args:
        store: Complete statistics.
        linears: Every linear of the model.
        samples: Prefix of the calibration sequences; None for all.
    """
    layers: dict[str, dict[int, int]] = {}
    helped: set[tuple[str, int]] = set()
    for linear in linears:
        if not linear.is_expert:
            continue
        path, expert = _place(linear)
        tokens = store.tokens(linear, samples)
        layers.setdefault(path, {})[expert] = tokens
        if tokens < ENOUGH_TOKENS_PER_INPUT * linear.in_features:
            helped.add((path, expert))
    if not layers:
        return None
    ordered = {path: tuple(seen[key] for key in sorted(seen)) for path, seen in layers.items()}
    return ExpertCoverage(ordered, len(helped))


def _sum(a: LayerStatistics, b: LayerStatistics) -> LayerStatistics:
    """Add input sums; gradients are each expert's own."""
    return replace(
        a,
        tokens=a.tokens + b.tokens,
        moment_weight=None if a.moment_weight is None else a.rows + b.rows,
        second_moment=a.second_moment + b.second_moment,
        absolute_maximum=torch.maximum(a.absolute_maximum, b.absolute_maximum),
        absolute_sum=a.absolute_sum + b.absolute_sum,
    )


def kind_of_expert(linear: LinearSpec) -> tuple[str, str]:
    """Return the path of a layer's experts, and which of their inputs a linear reads."""
    path, _, rest = linear.input_group.rpartition(".experts.")
    return f"{path}.experts", rest.partition(".")[2]


def _place(linear: LinearSpec) -> tuple[str, int]:
    """Return the path of a layer's experts and the number of one."""
    path, _, rest = linear.name.rpartition(".experts.")
    return f"{path}.experts", int(rest.partition(".")[0])
