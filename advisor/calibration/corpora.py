"""Text to calibrate on and to evaluate on: the built-in corpora, and files of the user's own."""

from __future__ import annotations

import hashlib
import importlib.resources
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from advisor.calibration.text_files import decode, document_of, is_text_file, read_files
from advisor.errors import InputError, did_you_mean, join_errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from advisor.calibration.text_files import Render

Part = Literal["calibration", "evaluation"]

KINDS = ("facts", "fiction", "languages")
"""Further kinds of built-in text, beside the technical English of the two parts themselves."""
BUILTIN_TEXTS = (*get_args(Part), *(f"{kind}-{part}" for kind in KINDS for part in get_args(Part)))
GENERAL = "general"
GENERAL_SHARES = {"calibration": 2.0, "facts-calibration": 1.0, "fiction-calibration": 1.0}
"""What ``builtin:general`` is mixed of.

On SmolLM2-135M (int4 g32 asym with feedback, damping 0.15, 32×256 calibration tokens), KL on 24×256
tokens of technical English and of Wikipedia: technical English alone 0.038 and 0.162; half of it
facts 0.045 and 0.103; half of it written by the model itself 0.043 and 0.098; these shares 0.043
and 0.097. Facts are near to Wikipedia in kind; text of other kinds was not judged.
"""
BUILTIN_NAMES = (*BUILTIN_TEXTS, GENERAL)
BUILTIN_PREFIX = "builtin:"
CALIBRATION_PERCENT = 65
# This salt gives parts of about two to one, which share no 16 words in a row.
_PART_SALT = 37
DATASET_PREFIX = "hf:"
OWN_TEXT = "self"
"""Names the text that the model writes itself (:mod:`advisor.calibration.own_text`)."""
_MOST_RECORDS = 20_000
"""Records read of a data set: more text than any calibration draws from."""
TEXT_SUFFIXES = (
    ".txt", ".md", ".rst", ".jsonl", ".ndjson",
    ".py", ".c", ".h", ".cc", ".cpp", ".hpp", ".cs", ".go", ".java", ".js", ".kt", ".php", ".rb",
    ".rs", ".scala", ".sh", ".sql", ".swift", ".ts", ".html", ".css", ".tex",
)  # fmt: skip
"""What is read of a folder: prose and source text."""
# In the packaged files a form feed and a name open each document.
_DOCUMENT_MARK = "\f"


@dataclass(frozen=True, slots=True)
class Corpus:
    """A list of documents.

    Attributes:
        name: Where the text came from: the sources as they were given, joined by ``" + "``.
        documents: Texts that do not continue one another, none of them blank.
        sha256: Hash of the documents in order, the identity of the corpus.
        sources: The source of each document.
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    sources: tuple[str, ...] = ()


def builtin_part(topic: str) -> Part:
    """Return the part of the built-in text that a topic belongs to.

    The rule looks at the topic's name alone, so no text can stand in both parts, and a new topic
    moves no other.
    """
    digest = hashlib.sha256(f"{_PART_SALT}:{topic}".encode()).digest()
    number = int.from_bytes(digest[:8], "big") % 100
    return "calibration" if number < CALIBRATION_PERCENT else "evaluation"


def builtin_documents(name: str) -> dict[str, str]:
    """Return the documents of a built-in text, by topic.

    ``calibration`` and ``evaluation`` are technical English: the reference that CPython 3.11 ships
    as ``pydoc_data.topics``. The parts of the other kinds are named as ``facts-calibration``. All
    are fixed copies, so that plans reproduce; ``texts/SOURCES.md`` says where they are from.
    ``general`` has the documents of several, in whose place sequences are drawn in fixed shares.

    Raises:
        InputError: There is no such text.
    """
    if name not in BUILTIN_NAMES:
        raise InputError(
            f"the built-in texts are {', '.join(BUILTIN_NAMES)}, but got {name!r}."
            f"{did_you_mean(name, BUILTIN_NAMES)}"
        )
    if name == GENERAL:
        parts = [builtin_documents(part) for part in GENERAL_SHARES]
        return {topic: text for part in parts for topic, text in part.items()}
    file = importlib.resources.files("advisor.calibration") / "texts" / f"{name}.txt"
    marked = decode(file.read_bytes()).split(_DOCUMENT_MARK)[1:]
    return dict(document.split("\n", maxsplit=1) for document in marked)


def builtin_corpus(name: str) -> Corpus:
    """Return a built-in text; one for calibration and one for evaluation share nothing.

    Raises:
        InputError: There is no such text.
    """
    return _corpus(BUILTIN_PREFIX + name, builtin_documents(name).values())


def load_corpus(sources: Sequence[str] | str, render: Render | None = None) -> Corpus:
    """Read text from one or several sources, in the order given.

    Args:
        sources: Each is a built-in text as ``"builtin:NAME"``, a text file (UTF-8,
            one document), a ``.jsonl`` file (one document per line: its ``"text"``, or its
            ``"messages"``, a conversation), either compressed as ``.gz``, a folder of such files
            and of source code (:data:`TEXT_SUFFIXES`, at any depth, by name), or a data set of the
            Hugging Face hub as ``hf:NAME[:CONFIG[:SPLIT]]``. Of very large ones parts are read
            (:func:`advisor.calibration.text_files.read_files`).
        render: Applies the model's chat template to conversations; without one they are refused.

    Raises:
        InputError: A source is missing, empty, twice in the list or not text; all are named.
    """
    names = [sources] if isinstance(sources, str) else list(sources)
    if not names:
        raise InputError("at least one source of text is needed, but the list is empty.")
    documents: list[str] = []
    origins: list[str] = []
    problems = [
        f"the source {name!r} is given {names.count(name)} times; name it once."
        for name in dict.fromkeys(names)
        if names.count(name) > 1
    ]
    for name in dict.fromkeys(names):
        try:
            found = _read_source(name, render)
            documents += found
            origins += [name] * len(found)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError(join_errors(problems))
    return _corpus(" + ".join(names), documents, origins)


def check_place(name: str) -> None:
    """Refuse a file or folder that is not there, without reading what is.

    Raises:
        InputError: There is nothing of that name, or two things are.
    """
    if name.startswith(BUILTIN_PREFIX):
        builtin_documents(name.removeprefix(BUILTIN_PREFIX))
        return
    if name == OWN_TEXT:
        if Path(name).exists():
            raise InputError(
                f"{name!r} is text that the model writes itself, but here is also a file or folder "
                f"of that name: write ./{name} for that, or rename it."
            )
        return
    if not name.startswith(DATASET_PREFIX) and not Path(name).exists():
        raise InputError(_no_text_at(name))


def _no_text_at(name: str) -> str:
    named = [*(BUILTIN_PREFIX + known for known in BUILTIN_NAMES), OWN_TEXT]
    return (
        f"there is no text at {name!r}. Give a file, a folder, a data set of the Hugging Face hub "
        f"({DATASET_PREFIX}NAME) or one of {', '.join(named)} (text that the model writes itself)."
        f"{did_you_mean(name, named)}"
    )


def _read_source(name: str, render: Render | None) -> list[str]:
    if name.startswith(BUILTIN_PREFIX):
        return list(builtin_documents(name.removeprefix(BUILTIN_PREFIX)).values())
    if name.startswith(DATASET_PREFIX):
        return _read_dataset(name, render)
    path = Path(name)
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).parts)
            if is_text_file(file, TEXT_SUFFIXES)
        ]
        if not files:
            raise InputError(
                f"a folder of text needs files ending in {', '.join(TEXT_SUFFIXES)}, "
                f"but {name!r} has none."
            )
    elif path.is_file():
        files = [path]
    else:
        raise InputError(_no_text_at(name))
    documents = read_files(files, render)
    if not any(document.strip() for document in documents):
        raise InputError(f"{name!r} has no text: it is empty or blank.")
    return documents


def _read_dataset(name: str, render: Render | None) -> list[str]:
    """Read a data set of the hub; without a split, its ``train`` part."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name!r} needs the datasets library ({error}): pip install datasets."
        ) from error
    parts = name.removeprefix(DATASET_PREFIX).split(":")
    if not parts[0] or len(parts) > 3:
        raise InputError(f"a data set is given as hf:NAME[:CONFIG[:SPLIT]], but got {name!r}.")
    config = parts[1] if len(parts) > 1 and parts[1] else None
    split = parts[2] if len(parts) > 2 else "train"
    try:
        rows = datasets.load_dataset(parts[0], config, split=split, streaming=True)
        taken = list(itertools.islice(rows, _MOST_RECORDS))
    except Exception as error:  # the hub, the network and the data set's format each have theirs
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"the data set {name!r} cannot be read: {reason}") from error
    return [document_of(row, f"record {i} of {name!r}", render) for i, row in enumerate(taken)]


def _corpus(name: str, documents: Iterable[str], origins: Sequence[str] = ()) -> Corpus:
    texts = list(documents)
    known = list(origins) or [name] * len(texts)
    pairs = [pair for pair in zip(texts, known, strict=True) if pair[0].strip()]
    kept = tuple(document for document, _ in pairs)
    digest = hashlib.sha256()
    for document in kept:
        encoded = document.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    sources = tuple(source for _, source in pairs)
    return Corpus(name=name, documents=kept, sha256=digest.hexdigest(), sources=sources)
