"""Measure a model against the unquantized one, sequence by sequence.

Memory: what :mod:`advisor.evaluation.logits` holds, and a few tokens of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advisor.errors import AdvisorError
from advisor.evaluation.intervals import CONFIDENCE, mean_interval
from advisor.evaluation.logits import GROUP_TOKENS, iterate_log_probabilities
from advisor.plan.schema import Interval

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from advisor.evaluation.reference import Reference

_PARTS = 256
"""Into which a vocabulary is cut to find its largest value, ..."""
_NARROWEST = 64
"""... and how wide they must be for that to pay."""
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Per-sequence results of a quantized model, paired with the unquantized one.

    Attributes:
        sequence_kl: float64 [sequences], mean KL(reference ‖ quantized) per token, nats.
        sequence_nll: float64 [sequences], mean negative log-likelihood of the text, nats per token.
        sequence_reference_nll: The same of the unquantized model.
        sequence_agreement: float64 [sequences], share of tokens where both models' likeliest next
            token is the same.
    """

    sequence_kl: NDArray[np.float64]
    sequence_nll: NDArray[np.float64]
    sequence_reference_nll: NDArray[np.float64]
    sequence_agreement: NDArray[np.float64]

    @property
    def sequences(self) -> int:
        """Number of sequences measured."""
        return len(self.sequence_kl)

    @property
    def perplexity(self) -> float:
        """Perplexity of the quantized model."""
        return float(np.exp(self.sequence_nll.mean()))

    @property
    def reference_perplexity(self) -> float:
        """Perplexity of the unquantized model on the same sequences."""
        return float(np.exp(self.sequence_reference_nll.mean()))

    @property
    def loss(self) -> Interval:
        """Relative perplexity increase (0.03 = 3%) and its paired 95% interval."""
        return self.loss_interval()

    def loss_interval(self, confidence: float = CONFIDENCE) -> Interval:
        """Return the relative perplexity increase with a paired interval of that confidence."""
        interval = mean_interval(self.sequence_nll - self.sequence_reference_nll, confidence)
        return Interval(
            value=_expm1(interval.value), low=_expm1(interval.low), high=_expm1(interval.high)
        )

    @property
    def kl(self) -> Interval:
        """Mean KL(reference ‖ quantized) per token, nats, and its 95% interval."""
        return mean_interval(self.sequence_kl)

    @property
    def top1(self) -> Interval:
        """Top-1 agreement and its 95% interval, cut at 1."""
        interval = mean_interval(self.sequence_agreement)
        return interval.model_copy(
            update={"low": max(interval.low, 0.0), "high": min(interval.high, 1.0)}
        )

    def first(self, count: int) -> Measurement:
        """Return the results of the first sequences."""
        return Measurement(
            self.sequence_kl[:count],
            self.sequence_nll[:count],
            self.sequence_reference_nll[:count],
            self.sequence_agreement[:count],
        )

    def then(self, other: Measurement) -> Measurement:
        """Return these results and those of further sequences."""
        return Measurement(
            np.concatenate([self.sequence_kl, other.sequence_kl]),
            np.concatenate([self.sequence_nll, other.sequence_nll]),
            np.concatenate([self.sequence_reference_nll, other.sequence_reference_nll]),
            np.concatenate([self.sequence_agreement, other.sequence_agreement]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what a report shows."""
        return {
            "sequences": self.sequences,
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "loss": self.loss.model_dump(),
            "kl": self.kl.model_dump(),
            "top1_agreement": self.top1.model_dump(),
        }


def _expm1(value: float) -> float:
    """Return exp(value) - 1, infinite where a float cannot hold it."""
    return math.inf if value > 700.0 else math.expm1(value)


def measure(
    model: nn.Module,
    reference: Reference,
    *,
    progress: Progress | None = None,
    stop: Callable[[Measurement], bool] | None = None,
    known: Measurement | None = None,
) -> Measurement:
    """Measure a model on the reference's sequences, in their order.

    Args:
        model: The model as it is to be judged, for example inside
            :func:`advisor.evaluation.runtime.quantized_model`.
        reference: What the unquantized model says of the same sequences.
        progress: Called with (sequences' worth of work done, sequences in all).
        stop: Called after each sequence with what is measured so far; True ends the measurement,
            for pruning a hopeless candidate or when a decision is clear. Sequences
            run through the blocks in groups, smaller ones where this is given.
        known: What a measurement that ended early found of the first sequences; they are not
            measured again.

    Raises:
        AdvisorError: The stored reference is damaged, or the model's outputs are not finite.
    """
    rows: list[tuple[float, float, float]] = []
    if known is not None:
        columns = (known.sequence_kl, known.sequence_nll, known.sequence_agreement)
        rows = [(float(a), float(b), float(c)) for a, b, c in zip(*columns, strict=True)]
    result = _measurement(rows, reference)
    texts = list(reference.sequences.tokens)[len(rows) :]
    before = len(rows)
    sums = _Sums()

    def step(done: int, _: int) -> None:
        if progress is not None:
            progress(before + done, reference.count)

    group = GROUP_TOKENS if stop is None else GROUP_TOKENS // 4
    for place, start, ours in iterate_log_probabilities(model, texts, step, group):
        if start == 0:
            reference.check(before + place)
        stored = reference.rows(before + place, start, len(ours))
        sums.add(ours, stored, texts[place][start + 1 :])
        if start + len(ours) < len(texts[place]) - 1:
            continue
        rows.append(sums.take())
        result = _measurement(rows, reference)
        if stop is not None and stop(result):
            break
    return result


def likeliest(values: Tensor) -> Tensor:
    """Return the place of each row's first largest value, int64 [rows].

    As ``argmax`` does, which on a CPU looks at value after value: this takes an eighth of the time.
    """
    width = values.shape[1] // _PARTS
    if width < _NARROWEST:
        return values.argmax(-1)
    parts = values[:, : width * _PARTS].view(len(values), _PARTS, width)
    best = parts.amax(-1)
    first = best.argmax(-1, keepdim=True)
    inside = parts.gather(1, first.unsqueeze(-1).expand(-1, -1, width))[:, 0]
    place: Tensor = first[:, 0] * width + inside.argmax(-1)
    left = values[:, width * _PARTS :]
    if left.shape[1]:
        last = left.max(-1)
        place = torch.where(last.values > best.amax(-1), last.indices + width * _PARTS, place)
    return place


def _measurement(rows: list[tuple[float, float, float]], reference: Reference) -> Measurement:
    table = np.array(rows, dtype=np.float64).reshape(-1, 3)
    return Measurement(
        sequence_kl=table[:, 0],
        sequence_nll=table[:, 1],
        sequence_reference_nll=reference.nll[: len(rows)],
        sequence_agreement=table[:, 2],
    )


class _Sums:
    """Sums over the tokens of one sequence."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._divergence = self._likelihood = 0.0
        self._agreed = self._tokens = 0

    def add(self, ours: Tensor, stored: Tensor, following: Tensor) -> None:
        """Add tokens.

        Args:
            ours: Log-probabilities, float32 [rows, vocabulary]; overwritten.
            stored: The reference's, float16 of the same shape.
            following: The text's own next tokens, int64, of which the first ``rows`` count.
        """
        theirs = torch.log_softmax(stored.to(ours.device).to(torch.float32), dim=-1)
        labels = following[: len(ours)].to(ours.device)
        self._likelihood -= float(ours.gather(1, labels[:, None]).sum(dtype=torch.float64))
        self._agreed += int((likeliest(ours) == likeliest(theirs)).sum())
        # float32 sums over the vocabulary err by 1e-7 of terms that add up to about KL itself.
        ours.sub_(theirs)
        terms = theirs.exp_().mul_(ours).sum(-1)
        self._divergence -= float(terms.sum(dtype=torch.float64))
        self._tokens += len(ours)

    def take(self) -> tuple[float, float, float]:
        """Return mean KL, mean negative log-likelihood and agreement, and start again."""
        if not (math.isfinite(self._divergence) and math.isfinite(self._likelihood)):
            raise AdvisorError(
                "the quantized model's outputs are not finite: a scale or a weight overflowed. "
                "Use another scheme, or a wider data type for scales."
            )
        count = self._tokens
        means = (self._divergence / count, self._likelihood / count, self._agreed / count)
        self._start()
        return means
