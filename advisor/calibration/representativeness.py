"""How well calibration text stands for the text that answers are judged on.

Memory holds one block in float32, two moments of its first linear, and the hidden states of at
most 32 sequences.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advisor.calibration.moments import unpack_moment
from advisor.calibration.passes import BATCH_TOKENS
from advisor.calibration.tapes import InputTape
from advisor.models.blocks import BlockRunner, head_tokens, rows_at_once
from advisor.models.inspect import block_linears
from advisor.plan.files import write_atomically
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

_VERSION = 1
"""Of what is compared, and how."""
SEQUENCES = 16
"""Sequences of each text that are compared, where a caller does not say."""
_FEWEST = 4
_LOW_COVERAGE = 0.75
_HIGH_GAP = 0.5
_FAR = 2.0


@dataclass(frozen=True, slots=True)
class Representativeness:
    """Calibration text beside evaluation text, as the unquantized model sees both.

    Attributes:
        token_coverage: Share of the evaluation's tokens whose kind occurs in the calibration.
        calibration_nll: Mean negative log-likelihood of the calibration text, nats per token.
        evaluation_nll: Of the evaluation text.
        moment_distance: Per block, the relative distance of the second moments of its inputs: of
            the calibration text from the evaluation text.
        moment_noise: Per block, the same between two halves of the calibration text, which is
            what chance alone makes with half as much text.
    """

    token_coverage: float
    calibration_nll: float
    evaluation_nll: float
    moment_distance: tuple[float, ...]
    moment_noise: tuple[float, ...]

    @property
    def perplexity_gap(self) -> float:
        """Logarithm of the ratio of perplexities: positive where the evaluation is harder."""
        return self.evaluation_nll - self.calibration_nll

    @property
    def moment_ratio(self) -> float:
        """Median over the blocks of distance over noise; about 0.7 to 1 for text of one kind."""
        ratios = [
            distance / max(noise, 1e-9)
            for distance, noise in zip(self.moment_distance, self.moment_noise, strict=True)
        ]
        return float(np.median(ratios))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user should know; empty where the calibration text is like the evaluation's."""
        found = []
        if self.token_coverage < _LOW_COVERAGE:
            found.append(
                f"of the evaluation text's tokens only {self.token_coverage:.0%} occur in the "
                "calibration text"
            )
        if abs(self.perplexity_gap) > _HIGH_GAP:
            found.append(
                f"the 16-bit model's perplexity is {np.exp(self.calibration_nll):.1f} on the "
                f"calibration text and {np.exp(self.evaluation_nll):.1f} on the evaluation text"
            )
        if self.moment_ratio > _FAR:
            found.append(
                f"the layers' inputs differ between the texts {self.moment_ratio:.1f} times as "
                "much as between halves of the calibration text"
            )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Return what the plan and a report hold."""
        return {
            "token_coverage": self.token_coverage,
            "calibration_perplexity": float(np.exp(self.calibration_nll)),
            "evaluation_perplexity": float(np.exp(self.evaluation_nll)),
            "moment_ratio": self.moment_ratio,
            "warnings": list(self.warnings),
        }


def representativeness(
    loaded: LoadedModel,
    calibration: TokenSequences,
    evaluation: TokenSequences,
    progress: Callable[[int, int], None] | None = None,
    sequences: int = SEQUENCES,
) -> Representativeness | None:
    """Compare two texts by a forward pass over some of their sequences, block by block.

    The distance of second moments is ‖A/tr A - B/tr B‖ / ‖A/tr A‖ (Frobenius), after both are
    scaled by the calibration's diagonal, so that no channel counts more for being large.

    Args:
        loaded: The unquantized model.
        calibration: What codes are fitted to.
        evaluation: What answers are judged on.
        progress: Called with (blocks done, blocks in all).
        sequences: Of each text, at most.

    Returns:
        None where a text has fewer than four sequences: chance would decide.
    """
    count = min(sequences, calibration.sequences, evaluation.sequences)
    if count < _FEWEST:
        return None
    half = count // 2
    length = min(calibration.sequence_length, evaluation.sequence_length)
    tokens = torch.cat(
        [calibration.tokens[: 2 * half, :length], evaluation.tokens[: 2 * half, :length]]
    )
    parts = [slice(0, half), slice(half, 2 * half), slice(2 * half, 4 * half)]
    distances, noises, nll = _compare(loaded, tokens, parts, progress)
    known = torch.unique(calibration.tokens)
    covered = torch.isin(evaluation.tokens, known).double().mean()
    return Representativeness(
        token_coverage=float(covered),
        calibration_nll=float(nll[: 2 * half].mean()),
        evaluation_nll=float(nll[2 * half :].mean()),
        moment_distance=tuple(distances),
        moment_noise=tuple(noises),
    )


def kept_representativeness(
    loaded: LoadedModel,
    calibration: TokenSequences,
    evaluation: TokenSequences,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    sequences: int = SEQUENCES,
) -> Representativeness | None:
    """Return what :func:`representativeness` finds, from disk where it was found before.

    Args:
        loaded: The unquantized model.
        calibration: What codes are fitted to.
        evaluation: What answers are judged on.
        folder: Folder of the cache; a file named by its content is made inside.
        progress: Called with (blocks done, blocks in all) where it is found now.
        sequences: Of each text, at most.

    Raises:
        InputError: The folder cannot be written.
    """
    parts = [loaded.fingerprint, str(loaded.dtype), calibration.sha256, evaluation.sha256]
    path = folder / "comparisons" / f"{sha256_json([_VERSION, sequences, *parts])[:32]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else float(value)
            for name, value in kept.items()
        }
        return Representativeness(**values)
    except (OSError, ValueError, TypeError, AttributeError):
        pass  # not there, or not whole
    found = representativeness(loaded, calibration, evaluation, progress, sequences)
    if found is not None:
        write_atomically(path, json.dumps(asdict(found)))
    return found


def _compare(
    loaded: LoadedModel,
    tokens: Tensor,
    parts: list[slice],
    progress: Callable[[int, int], None] | None,
) -> tuple[list[float], list[float], Tensor]:
    """Return distance and noise of every block, and every sequence's log-loss."""
    runner = BlockRunner(loaded.model)
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    batches = [
        slice(start, min(start + size, part.stop))
        for part in parts
        for start in range(part.start, part.stop, size)
    ]
    ends = {part.stop for part in parts}
    with runner.at_embedding():
        states = [runner.embed(tokens[batch].to(loaded.device)) for batch in batches]
    distances, noises = [], []
    for block in range(len(runner.blocks)):
        linear = block_linears(loaded.linears, block)[0]
        key = f"{linear.input_group}/moment"
        moments = []
        with (
            InputTape(loaded.model, [linear], loaded.device) as tape,
            runner.at_block(block),
            torch.no_grad(),
        ):
            for index, batch in enumerate(batches):
                states[index] = runner.run(block, states[index])
                if batch.stop in ends:
                    taken = tape.take()[key].to(loaded.device)
                    moments.append(unpack_moment(taken, linear.in_features))
        first, second, other = moments
        scale = (first + second).diagonal().clamp_min(1e-12).rsqrt()
        distances.append(moment_distance(first + second, other, scale))
        noises.append(moment_distance(first, second, scale))
        if progress is not None:
            progress(block + 1, len(runner.blocks))
    with runner.at_head():
        nll = [
            _log_loss(runner, hidden, tokens[batch])
            for hidden, batch in zip(states, batches, strict=True)
        ]
    return distances, noises, torch.cat(nll)


def moment_distance(first: Tensor, second: Tensor, scale: Tensor) -> float:
    """Return ‖A/tr A - B/tr B‖ / ‖A/tr A‖ of two moments, rows and columns scaled before."""
    a, b = (moment.double() * scale[:, None] * scale for moment in (first, second))
    a, b = a / a.trace(), b / b.trace()
    return float((a - b).norm() / a.norm())


def _log_loss(runner: BlockRunner, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of each sequence, float64 [sequences]."""
    found = []
    tokens_at_once = head_tokens(runner.vocabulary, runner.device)
    with torch.no_grad():
        for row, labels in zip(hidden, tokens, strict=True):
            total, wanted = 0.0, labels[1:]
            for start in range(0, len(wanted), tokens_at_once):
                part = slice(start, min(start + tokens_at_once, len(wanted)))
                logits = runner.head(row[part]).float()
                rows = rows_at_once(logits.shape[1], logits.device)
                for first in range(0, len(logits), rows):
                    few = logits[first : first + rows]
                    own = wanted[part][first : first + rows].to(few.device)
                    losses = torch.nn.functional.cross_entropy(few, own, reduction="none")
                    total += float(losses.sum(dtype=torch.float64))
                del logits, few  # before the next ones are computed
            found.append(total / len(wanted))
    return torch.tensor(found, dtype=torch.float64)
