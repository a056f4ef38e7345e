"""Calibration and evaluation text: drawn from what the user named, and drawn again from a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advisor.calibration.corpora import load_corpus
from advisor.calibration.tokens import TokenSequences, draw_sequences
from advisor.errors import InputError, join_errors
from advisor.plan.schema import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

SEPARATOR = " + "
"""Stands between the sources in a corpus's name."""


def draw(
    sources: Sequence[str],
    tokenizer: Any,
    *,
    role: str,
    sequences: int,
    sequence_length: int,
    seed: int,
    most: int | None = None,
) -> TokenSequences:
    """Draw sequences from the sources, or from the built-in text of the role if there are none.

    Where the text has more than ``sequences``, up to ``most`` are drawn.

    Raises:
        InputError: A source is missing, empty or too short.
    """
    corpus = load_corpus(list(sources) or [f"builtin:{role}"])
    return draw_sequences(
        corpus,
        tokenizer,
        sequences=sequences,
        sequence_length=sequence_length,
        seed=seed,
        role=role,
        most=most,
    )


def describe(sequences: TokenSequences) -> Text:
    """Return what a plan says of drawn sequences."""
    return Text(
        corpus=sequences.corpus,
        sha256=sequences.corpus_sha256,
        sequences=sequences.tokens.shape[0],
        sequence_length=sequences.tokens.shape[1],
        seed=sequences.seed,
        tokens_sha256=sequences.sha256,
    )


def redraw(text: Text, tokenizer: Any, role: str) -> TokenSequences:
    """Draw the sequences of a plan again.

    Raises:
        InputError: The text or the tokenizer is not what it was.
    """
    sequences = draw(
        text.corpus.split(SEPARATOR),
        tokenizer,
        role=role,
        sequences=text.sequences,
        sequence_length=text.sequence_length,
        seed=text.seed,
    )
    problems = []
    if sequences.corpus_sha256 != text.sha256:
        problems.append(
            f"the {role} text {text.corpus} has changed since the plan was made: sha256 is "
            f"{sequences.corpus_sha256[:16]}, the plan says {text.sha256[:16]}. Restore it, or "
            "tune again."
        )
    elif sequences.sha256 != text.tokens_sha256:
        problems.append(
            f"the {role} tokens differ from the plan's although the text is the same: the "
            "tokenizer or its version has changed. Install the versions that the plan names."
        )
    if problems:
        raise InputError(join_errors(problems))
    return sequences


def parse_slices(slices: Sequence[str]) -> dict[str, list[str]]:
    """Return the sources of each slice by name; a name may be given several times.

    Raises:
        InputError: Something is not ``name=source``; all offenders are named.
    """
    found: dict[str, list[str]] = {}
    problems = []
    for text in slices:
        name, separator, source = text.partition("=")
        if not (separator and name.strip() and source.strip()):
            problems.append(f"--slice must be NAME=PATH such as code=src/, but got {text!r}.")
        else:
            found.setdefault(name.strip(), []).append(source.strip())
    if problems:
        raise InputError(join_errors(problems))
    return found
