"""Token sequences: which windows of a corpus calibrate or judge, by seed and by hash."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advisor.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.corpora import Corpus

OVERLAP_WINDOW = 32
"""Tokens in a row that two texts must share to be called overlapping; of short ones more."""
OVERLAP_CHARACTERS = 128
"""Characters in a row that it takes at least.

Short tokens say little: of the built-in technical English 3.3% of all runs of 32 bytes for
evaluation are among those for calibration, as phrases recur; of 64 bytes 0.16%, of 96 none.
"""
OVERLAP_LIMIT = 0.01
"""Largest share of the evaluation's windows that may also be in the calibration."""
_HASH_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class TokenSequences:
    """Equally long token sequences.

    Attributes:
        tokens: int64 [sequences, sequence_length].
        corpus: Name of the corpus they were cut from.
        corpus_sha256: Hash of its text.
        seed: Seed of the shuffle.
        sha256: Hash of the tokens themselves.
        sources: The source that each sequence begins in; empty where that was not kept.
        characters_per_token: How much text a token stands for; None where that is not known.
    """

    tokens: Tensor
    corpus: str
    corpus_sha256: str
    seed: int
    sha256: str
    sources: tuple[str, ...] = ()
    characters_per_token: float | None = None

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens of a sequence."""
        return self.tokens.shape[1]

    def first(self, sequences: int) -> TokenSequences:
        """Return the first sequences; a draw of that many would have given the same."""
        return self.part(0, sequences)

    def part(self, start: int, stop: int) -> TokenSequences:
        """Return the sequences from one place to before another."""
        return self._pick(range(self.sequences)[start:stop])

    def of_source(self, source: str) -> TokenSequences:
        """Return the sequences of one source, in their order."""
        return self._pick([i for i, name in enumerate(self.sources) if name == source])

    def check_vocabulary(self, rows: int) -> None:
        """Refuse tokens that a model has no embedding for.

        Args:
            rows: Rows of the model's embedding.

        Raises:
            InputError: A token is beyond them.
        """
        largest = int(self.tokens.max())
        if largest >= rows:
            raise InputError(
                f"the tokenizer gives token {largest} for the text {self.corpus!r}, but the model "
                f"embeds {rows} tokens only: tokenizer and model do not belong together. Give the "
                "tokenizer that the model was trained with."
            )

    def _pick(self, places: Sequence[int]) -> TokenSequences:
        tokens = self.tokens[list(places)]
        sources = tuple(self.sources[i] for i in places) if self.sources else ()
        return replace(self, tokens=tokens, sha256=hash_tokens(tokens), sources=sources)


def hash_tokens(tokens: Tensor) -> str:
    """Return the sha256 of a [sequences, sequence_length] table of tokens."""
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode())
    digest.update(tokens.to(torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def draw_sequences(
    corpus: Corpus,
    tokenizer: Any,
    *,
    sequences: int,
    sequence_length: int,
    seed: int,
    role: str,
    most: int | None = None,
) -> TokenSequences:
    """Cut a corpus into windows that do not overlap and draw some of them.

    Documents are tokenized one by one and laid end to end. Where the tokenizer begins a text with
    a special token, every sequence begins with it, as the model expects. The first ``k`` of ``n``
    sequences are those that a draw of ``k`` gives.

    Args:
        corpus: The text.
        tokenizer: The model's tokenizer.
        sequences: How many to draw.
        sequence_length: Tokens of each, a leading special token included; at least 2.
        seed: Of the shuffle.
        role: What they are for (``calibration`` or ``evaluation``): named in errors.
        most: Where the text has more than ``sequences``, draw up to this many.

    Raises:
        InputError: The text is too short (says how many sequences it has), or a number is not
            positive.
    """
    if sequences < 1 or sequence_length < 2:
        raise InputError(
            f"{role} needs at least 1 sequence of at least 2 tokens, but got {sequences} of "
            f"{sequence_length}."
        )
    leading = leading_tokens(tokenizer)
    begins, found = _tokenized(corpus.documents, tokenizer)
    ids = torch.from_numpy(found)
    width = sequence_length - len(leading)
    available = len(ids) // width
    if available < sequences:
        raise InputError(
            f"{role} text {corpus.name!r} has {len(ids)} tokens: enough for {available} sequences "
            f"of {sequence_length} tokens, but {sequences} were asked for. Give more text, fewer "
            "sequences or shorter ones."
        )
    windows = ids[: available * width].view(available, width)
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    chosen = order[: max(sequences, most or 0)]
    tokens = windows[chosen].long()
    documents = np.searchsorted(begins, chosen.numpy() * width, side="right") - 1
    if leading:
        start = torch.tensor(leading, dtype=torch.int64).expand(len(tokens), -1)
        tokens = torch.cat([start, tokens], dim=1)
    return TokenSequences(
        tokens=tokens.contiguous(),
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        seed=seed,
        sha256=hash_tokens(tokens),
        sources=tuple(corpus.sources[i] for i in documents) if corpus.sources else (),
        characters_per_token=sum(map(len, corpus.documents)) / len(ids),
    )


def _tokenized(
    documents: Sequence[str], tokenizer: Any
) -> tuple[list[int], np.ndarray[Any, np.dtype[np.int32]]]:
    """Return where each document begins, and all tokens; Python's own numbers take ten times that.

    A document of many characters is tokenized at once, as it always was: a cut would show.
    """
    begins, parts, count = [], [], 0
    for document in documents:
        begins.append(count)
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(np.array(ids, dtype=np.int32))
        count += len(ids)
    return begins, np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)


def share_out(count: int, weights: Sequence[float]) -> list[int]:
    """Return whole shares of a count in proportion to weights; none of them is left with nothing.

    Raises:
        InputError: There are fewer to share than weights.
    """
    if count < len(weights):
        raise InputError(
            f"a mix of {len(weights)} texts needs at least as many sequences, but got {count}."
        )
    exact = [count * weight / sum(weights) for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != count:
        step = 1 if sum(shares) < count else -1
        able = [i for i in range(len(shares)) if shares[i] + step >= 1]
        place = max(able, key=lambda i: step * (exact[i] - shares[i]))
        shares[place] += step
    return shares


def mix_sequences(parts: Sequence[TokenSequences], name: str) -> TokenSequences:
    """Return sequences of several texts in one, so spread that every prefix has about the mix.

    Args:
        parts: Of equal length and seed.
        name: What the mix is called.
    """
    places = sorted(
        ((index + 0.5) / part.sequences, number, index)
        for number, part in enumerate(parts)
        for index in range(part.sequences)
    )
    tokens = torch.stack([parts[number].tokens[index] for _, number, index in places])
    digest = hashlib.sha256("".join(part.corpus_sha256 for part in parts).encode()).hexdigest()
    sources = tuple(parts[number].corpus for _, number, _ in places)
    known = [part for part in parts if part.characters_per_token is not None]
    each = [(part.characters_per_token or 0.0) * part.sequences for part in known]
    return TokenSequences(
        tokens, name, digest, parts[0].seed, hash_tokens(tokens), sources,
        sum(each) / sum(part.sequences for part in known) if known else None,
    )  # fmt: skip


def leading_tokens(tokenizer: Any) -> list[int]:
    """Return the special token that the tokenizer puts in front of every text, if it does."""
    beginning = getattr(tokenizer, "bos_token_id", None)
    if beginning is None:
        return []
    ids = tokenizer("a", verbose=False)["input_ids"]
    return [beginning] if ids[:1] == [beginning] else []


def overlap(calibration: TokenSequences, evaluation: TokenSequences) -> float:
    """Return the share of the evaluation's windows that calibration has as well.

    A window is :data:`OVERLAP_WINDOW` tokens, more where they would be less text than
    :data:`OVERLAP_CHARACTERS`, and at most a sequence.
    """
    width = min(_window(calibration, evaluation), calibration.sequence_length,
                evaluation.sequence_length)  # fmt: skip
    known = np.unique(_window_hashes(calibration.tokens, width))
    asked = _window_hashes(evaluation.tokens, width)
    return float(np.isin(asked, known).mean())


def _window(calibration: TokenSequences, evaluation: TokenSequences) -> int:
    """Return how many tokens in a row make two texts the same."""
    lengths = (calibration.characters_per_token, evaluation.characters_per_token)
    known = [length for length in lengths if length is not None]
    return max([OVERLAP_WINDOW, *(math.ceil(OVERLAP_CHARACTERS / length) for length in known)])


def check_disjoint(calibration: TokenSequences, evaluation: TokenSequences) -> float:
    """Refuse to judge on text that was calibrated on.

    Returns:
        The share of shared windows, for the plan.

    Raises:
        InputError: More than 1% of the evaluation's windows are also in the calibration.
    """
    share = overlap(calibration, evaluation)
    if share > OVERLAP_LIMIT:
        width = _window(calibration, evaluation)
        raise InputError(
            f"evaluation text {evaluation.corpus!r} overlaps calibration text "
            f"{calibration.corpus!r}: {share:.1%} of its windows of {width} tokens are in "
            f"both (at most {OVERLAP_LIMIT:.0%} is allowed). Give texts that share nothing."
        )
    return share


def _window_hashes(tokens: Tensor, width: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Return a 64-bit hash of every window of every sequence."""
    rows = tokens.numpy().astype(np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, width, dtype=np.uint64) * 2 + 1
    windows = np.lib.stride_tricks.sliding_window_view(rows, width, axis=1).reshape(-1, width)
    hashes = [
        (windows[start : start + _HASH_CHUNK] * factors).sum(axis=1, dtype=np.uint64)
        for start in range(0, len(windows), _HASH_CHUNK)
    ]
    return np.concatenate(hashes)
