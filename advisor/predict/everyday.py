"""Names of models as people say them: without a suffix, with other separators."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_VARIANTS = frozenset({"base", "pt", "it", "instruct", "chat", "hf"})
"""What tells a base model from its tuned ones, which have the same shapes."""
_SIZE = re.compile(r"\d+(\.\d+)?(x\d+)?[bm]")
_DETAIL = re.compile(r"v\d.*|\d{4}|\d+k|a\d+b")
"""A release, a date, a context or the active parameters of experts."""


def everyday_matches(name: str, known: Iterable[str]) -> list[str]:
    """Return the ids that an everyday name may mean, the nearest first.

    All words of the name are in the id, in this order and from its first; what else the id has
    tells no other model: a variant (base, instruct), a date, a context length, or behind the size a
    release. Family, version and size must be said.

    Args:
        name: What the user typed: ``mistral-7b``, ``gemma3:12b``, ``llama3.3 70b``.
        known: Ids, organisation/name.
    """
    asked = _words(name)
    said = [word for word in asked if word not in _VARIANTS]
    found = []
    for order, identity in enumerate(known):
        words = _words(identity.rpartition("/")[2])
        if said and words[:1] == said[:1] and (left := _left_out(said, words)) is not None:
            wanted = sum(word not in words for word in asked)  # a variant that was asked for
            found.append((wanted, len(left), order, identity))
    return [identity for *_, identity in sorted(found)]


def family_members(name: str, known: Iterable[str]) -> list[str]:
    """Return the ids that begin with all words of a name: ``mistral``, ``llama 3``."""
    asked = _words(name)
    return [
        identity
        for identity in known
        if asked and _words(identity.rpartition("/")[2])[: len(asked)] == asked
    ]


def _words(name: str) -> list[str]:
    """Return the parts of a name: ``Qwen2.5_7B-Instruct`` has qwen, 2.5, 7b and instruct."""
    text = re.sub(r"(?<=\d)_(?=\d)", ".", name.strip().lower())
    parts = re.split(r"[^a-z0-9.]+", re.sub(r"(?<=[a-z]{2})(?=\d)", "-", text))
    words = [part.strip(".") for part in parts if part.strip(".")]
    return words[1:] if words[:1] == ["meta"] else words


def _left_out(said: list[str], words: list[str]) -> list[str] | None:
    """Return the words of an id that a name leaves out; None where it means another model."""
    rest, left, sized = list(said), [], False
    for word in words:
        if rest and word == rest[0]:
            rest.pop(0)
        elif word in _VARIANTS or (_DETAIL.fullmatch(word) and (sized or word[0].isdigit())):
            left.append(word)
        else:
            return None
        sized = sized or _SIZE.fullmatch(word) is not None
    return None if rest else left
