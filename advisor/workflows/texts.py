"""Calibration and evaluation text: drawn from what the user named, and drawn again from a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.calibration.corpora import (
    BUILTIN_PREFIX,
    GENERAL,
    GENERAL_SHARES,
    OWN_TEXT,
    check_place,
    load_corpus,
)
from advisor.calibration.tokens import (
    TokenSequences,
    draw_sequences,
    mix_sequences,
    share_out,
)
from advisor.errors import InputError, join_errors
from advisor.plan.schema import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.calibration.text_files import Render

    Writer = Callable[[int, int, int], TokenSequences]

DEFAULT_TEXTS = {
    "calibration": BUILTIN_PREFIX + GENERAL,
    "evaluation": BUILTIN_PREFIX + "evaluation",
}
"""Text of each role where none is named."""
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
    own: Writer | None = None,
) -> TokenSequences:
    """Draw sequences from the sources, or from the built-in text of the role if there are none.

    Where the text has more than ``sequences``, up to ``most`` are drawn; of a mix, whose sources
    carry weights (``code.jsonl@2``), just as many as asked for, in these proportions.

    Args:
        sources: As users name them; ``self`` is text that the model writes itself.
        tokenizer: The model's.
        role: ``calibration``, ``evaluation`` or a slice's name, for errors.
        sequences: How many.
        sequence_length: Tokens of each.
        seed: Of what is drawn.
        most: Up to how many, where the text has more.
        own: Lets the model write so many sequences of a length, by a seed; None where its own text
            cannot serve.

    Raises:
        InputError: A source is missing, empty or too short.
    """
    named = list(sources) or [DEFAULT_TEXTS[role]]
    render = _chat_template(tokenizer)
    weights = _weights(named)
    _check_own(named if weights is None else list(weights), weights, role, own)
    if own is not None and named == [OWN_TEXT]:
        return own(max(sequences, most or 0), sequence_length, seed)
    if weights is None:
        return _draw_one(
            named, tokenizer, render, role=role, sequences=sequences,
            sequence_length=sequence_length, seed=seed, most=most,
        )  # fmt: skip
    shares = share_out(sequences, list(weights.values()))
    parts = [
        own(share, sequence_length, seed)
        if own is not None and source == OWN_TEXT
        else _draw_one(
            [source], tokenizer, render, role=f"{role} ({source})", sequences=share,
            sequence_length=sequence_length, seed=seed,
        )
        for source, share in zip(weights, shares, strict=True)
    ]  # fmt: skip
    return mix_sequences(parts, SEPARATOR.join(named))


def _draw_one(
    sources: list[str],
    tokenizer: Any,
    render: Render | None,
    *,
    role: str,
    sequences: int,
    sequence_length: int,
    seed: int,
    most: int | None = None,
) -> TokenSequences:
    """Draw from sources laid end to end; of the general built-in text, in its shares."""
    corpus = load_corpus(sources, render)
    parts = [BUILTIN_PREFIX + name for name in GENERAL_SHARES]
    if sources != [BUILTIN_PREFIX + GENERAL] or sequences < len(parts):
        return draw_sequences(
            corpus, tokenizer, sequences=sequences, sequence_length=sequence_length,
            seed=seed, role=role, most=most,
        )  # fmt: skip
    weights = list(GENERAL_SHARES.values())
    wanted = max(sequences, most or 0)
    drawn = [
        draw_sequences(
            load_corpus(part), tokenizer, sequences=fewest, sequence_length=sequence_length,
            seed=seed, role=f"{role} ({part})", most=share,
        )
        for part, fewest, share in zip(
            parts, share_out(sequences, weights), share_out(wanted, weights), strict=True
        )
    ]  # fmt: skip
    available = [part.sequences for part in drawn]
    while any(a < b for a, b in zip(available, share_out(wanted, weights), strict=True)):
        wanted -= 1
    taken = [
        part.first(share) for part, share in zip(drawn, share_out(wanted, weights), strict=True)
    ]
    mixed = mix_sequences(taken, corpus.name)
    # One text, not a mix of sources that the search would weigh against each other.
    return replace(mixed, corpus_sha256=corpus.sha256, sources=(corpus.name,) * wanted)


def _check_own(
    names: Sequence[str], weights: dict[str, float] | None, role: str, own: Writer | None
) -> None:
    """Refuse a model's own text where it cannot serve.

    Raises:
        InputError: It is to judge, or stands beside other text without a weight.
    """
    if OWN_TEXT not in names:
        return
    if own is None:
        raise InputError(
            f"{OWN_TEXT!r} is text that the model writes itself: to calibrate on, not for "
            f"{role}, which is to show how the model does on text of others. Give a file or folder."
        )
    if weights is None and len(names) > 1:
        listed = " ".join(f"--{role} {name}@1" for name in names)
        raise InputError(
            f"{OWN_TEXT!r}, text that the model writes itself, has no length of its own that would "
            f"say how much of it to take: give each text a weight, as in {listed}."
        )


def check_sources(sources: Sequence[str], *, own: bool = True) -> None:
    """Refuse texts that are not there, before a model is loaded.

    Args:
        sources: As users name them.
        own: Whether the model's own text may be among them.

    Raises:
        InputError: Lists every file and folder that does not exist.
    """
    problems = []
    for source in sources:
        name, _, weight = source.rpartition("@")
        try:
            check_place(name if name and weight.replace(".", "").isdigit() else source)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(join_errors(problems))
    if not own:
        _check_own(list(sources), None, "evaluation", None)


def _chat_template(tokenizer: Any) -> Render | None:
    """Return what turns a conversation into text, or None where the model has no template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    apply = tokenizer.apply_chat_template
    return lambda messages, tools: str(apply(messages, tools=tools, tokenize=False))


def _weights(sources: Sequence[str]) -> dict[str, float] | None:
    """Return source -> weight of a mix, written ``source@weight``; None where none has a weight.

    Raises:
        InputError: Only some sources have a weight, or a weight is not positive.
    """
    split = [(source, source.rpartition("@")) for source in sources]
    found: dict[str, float] = {}
    problems = []
    for source, (name, _, weight) in split:
        if not name or Path(source).exists():
            continue
        try:
            found[name] = float(weight)
        except ValueError:
            continue  # an @ in a name
        if not 0 < found[name] < float("inf"):
            problems.append(f"the weight of a text must be above 0, but got {source!r}.")
    if found and len(found) < len(sources):
        problems.append(
            "either all texts of a mix have a weight or none, but only "
            f"{len(found)} of {len(sources)} have one: write {sources[0]}@1."
        )
    if problems:
        raise InputError(join_errors(problems))
    return found or None


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


def redraw(text: Text, tokenizer: Any, role: str, own: Writer | None = None) -> TokenSequences:
    """Draw the sequences of a plan again.

    Raises:
        InputError: The text or the tokenizer is not what it was.
    """
    named = text.corpus.split(SEPARATOR)
    sequences = draw(
        named,
        tokenizer,
        role=role,
        sequences=text.sequences,
        sequence_length=text.sequence_length,
        seed=text.seed,
        own=own,
    )
    problems = []
    if sequences.sha256 != text.tokens_sha256 and OWN_TEXT in sequences.sources:
        problems.append(
            f"the {role} text {text.corpus} is not the plan's: what the model wrote itself came "
            "out otherwise than when the plan was made, as it may on another machine, with another "
            "number of threads or other versions"
            + (", or another part of the text has changed" if len(named) > 1 else "")
            + ". Put the file that was written with the plan beside it again (its name is the "
            "plan's and .self.npy), or tune again."
        )
    elif sequences.corpus_sha256 != text.sha256:
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
