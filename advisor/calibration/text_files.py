"""Text in files: UTF-8 and JSON lines, compressed or not; of very much, parts from all over it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, join_errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

MOST_BYTES = 16 << 20
"""Text that is read of a source: 2000 sequences of 2048 tokens, tokenized in about ten seconds."""
PARTS = 32
"""Of a source that has more, so many parts are read, evenly spread over it."""
_FEWEST_BYTES = 1 << 16
_LISTED = 5
_JSON_LINES = (".jsonl", ".ndjson")
_GZIP = ".gz"
_KINDS = (
    (b"\x1f\x8b", "compressed with gzip: name it .gz, or decompress it"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: decompress it"),
    (b"\xfd7zXZ\0", "compressed with xz: decompress it"),
    (b"BZh", "compressed with bzip2: decompress it"),
    (b"PK\x03\x04", "an archive (zip, or an office document): give the text in it"),
    (b"PAR1", "a Parquet table: write its text as JSON lines"),
    (b"%PDF", "a PDF: give its text"),
    (b"\xff\xfe", "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
)

Render = Callable[[list[Any], "list[Any] | None"], str]
"""Turns a conversation (a list of messages, and the tools that it may call) into text, as the
model's chat template does."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a file.

    Attributes:
        file: Which one.
        start: The first.
        stop: After the last; None where the file ends.
    """

    file: Path
    start: int = 0
    stop: int | None = None


def is_text_file(file: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file's name, without a ``.gz`` at its end, has one of these suffixes."""
    name = file.with_suffix("") if file.suffix.lower() == _GZIP else file
    return name.suffix.lower() in suffixes and file.is_file()


def read_files(files: Sequence[Path], render: Render | None) -> list[str]:
    """Return the documents of files: each file is one, each record of JSON lines.

    Of files that have more than :data:`MOST_BYTES` together, :data:`PARTS` parts are read, evenly
    spread over all of them; a part of a text is a document, and one of JSON lines has whole lines
    only. Of what is compressed the beginning is read.

    Raises:
        InputError: Files are not text, or not what their names say; the first few are named.
    """
    documents: list[str] = []
    problems = []
    most = max(_FEWEST_BYTES, MOST_BYTES // len(files))
    spans = _spans(files)
    for span in spans:
        try:
            documents += _read_span(span, render, most)
        except InputError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"'{span.file}' cannot be read: {error.strerror or error}.")
    if problems:
        raise InputError(join_errors(list(dict.fromkeys(problems)), most=_LISTED))
    if not documents and any(span.start for span in spans):
        raise InputError(
            f"of more than {MOST_BYTES >> 20} MiB parts of {MOST_BYTES // PARTS >> 10} kiB are "
            f"read, but no whole line of '{files[0]}' lies in one. Give shorter records or less."
        )
    return documents


def _spans(files: Sequence[Path]) -> list[_Span]:
    """Return what is read: the files, or parts from all over them."""
    sizes = [file.stat().st_size for file in files]
    total = sum(sizes)
    if total <= MOST_BYTES:
        return [_Span(file) for file in files]
    found = []
    for part in range(PARTS):
        start = part * total // PARTS
        stop, begin = start + MOST_BYTES // PARTS, 0
        for file, size in zip(files, sizes, strict=True):
            first, last = max(start, begin) - begin, min(stop, begin + size) - begin
            if first < last:
                found.append(_Span(file, first, None if last == size else last))
            begin += size
    compressed = [span for span in found if span.file.suffix.lower() == _GZIP]
    heads = {span.file: _Span(span.file) for span in compressed}
    return [span for span in found if span not in compressed] + list(heads.values())


def _read_span(span: _Span, render: Render | None, most: int) -> list[str]:
    file = span.file
    is_compressed = file.suffix.lower() == _GZIP
    name = file.with_suffix("") if is_compressed else file
    by_line = name.suffix.lower() in _JSON_LINES
    content = _unzipped(file, most, by_line) if is_compressed else _bytes_of(span, by_line)
    text = _text_of(file, content, span.start)
    if not by_line:
        return [text]
    counted = span.start == 0
    return list(_records(file, text, render, counted=counted))


def _bytes_of(span: _Span, by_line: bool) -> bytes:
    """Return the bytes of a span; of lines, those that begin in it, to the end of the last."""
    with span.file.open("rb") as handle:
        handle.seek(max(0, span.start - 1) if by_line else span.start)
        if span.start and by_line:  # past the end of one that begins before
            before = handle.readline(MOST_BYTES // PARTS)
            if not before.endswith(b"\n"):
                return b""
        if span.stop is None:
            return _whole_characters(handle.read(), span, by_line)
        content = handle.read(max(0, span.stop - handle.tell()))
        if by_line and content and not content.endswith(b"\n"):
            content += handle.readline(MOST_BYTES)
            if not content.endswith(b"\n") and handle.read(1):
                content = content[: content.rfind(b"\n") + 1]
    return _whole_characters(content, span, by_line)


def _whole_characters(content: bytes, span: _Span, by_line: bool) -> bytes:
    """Return bytes without the parts of characters that a cut left at their ends."""
    if by_line:
        return content
    first, last = 0, len(content)
    if span.start:
        while first < min(3, last) and content[first] & 0xC0 == 0x80:
            first += 1
    if span.stop is not None:
        for back in range(1, min(4, last - first) + 1):
            byte = content[last - back]
            if byte & 0xC0 != 0x80:
                wanted = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
                last -= back if wanted > back else 0
                break
    return content[first:last]


def _unzipped(file: Path, most: int, by_line: bool) -> bytes:
    """Return the beginning of what is compressed, in whole lines where there are any.

    Raises:
        InputError: It is not compressed so, or damaged.
    """
    try:
        with gzip.open(file, "rb") as handle:
            content = handle.read(most)
            if not handle.read(1):
                return content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"'{file}' is named as compressed with gzip, but: {error}.") from error
    end = content.rfind(b"\n") + 1
    return content[:end] if end or by_line else _whole_characters(content, _Span(file, 0, 1), False)


def _text_of(file: Path, content: bytes, start: int) -> str:
    """Return bytes as text.

    Raises:
        InputError: They are none; says what they are, where that can be seen.
    """
    for magic, kind in _KINDS:
        if start == 0 and content.startswith(magic):
            raise InputError(f"text must be UTF-8, but '{file}' is {kind}.")
    zeros = content.count(b"\0")
    if zeros:
        kind = "UTF-16" if 3 * zeros > len(content) else "a binary file"
        further = ": convert it with iconv -f UTF-16LE -t UTF-8" if kind == "UTF-16" else ""
        raise InputError(f"text has no NUL characters, but '{file}' does: it is {kind}{further}.")
    try:
        return decode(content)
    except UnicodeDecodeError as error:
        place = start + error.start
        raise InputError(
            f"text must be UTF-8, but byte {place} of '{file}' (0x{content[error.start]:02x}) is "
            f"not. Convert the file, if it is Latin-1 with: iconv -f LATIN1 -t UTF-8 '{file}'"
        ) from error


def decode(content: bytes) -> str:
    """Return UTF-8 as text, without a mark at its beginning, with line ends of one kind.

    So a checkout that rewrites line ends keeps the hash.
    """
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _records(file: Path, text: str, render: Render | None, *, counted: bool) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"line {number} of '{file}'" if counted else f"a line of '{file}' ({line[:40]}...)"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"every line of a {file.suffix} file is one JSON object, but {place} "
                f"is not: {error.msg}."
            ) from error
        yield document_of(record, place, render)


def document_of(record: Any, place: str, render: Render | None) -> str:
    """Return the text of a record, or of its conversation.

    Args:
        record: What a line of JSON or a row of a data set holds.
        place: Where it is, for errors.
        render: Applies the model's chat template; None where it has none.

    Raises:
        InputError: It has neither, or the template refuses it.
    """
    document = record.get("text") if isinstance(record, dict) else None
    if isinstance(document, str):
        return document
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        keys = (
            f": its keys are {', '.join(map(str, record))[:80]}" if isinstance(record, dict) else ""
        )
        raise InputError(
            f'a record needs a "text" string or a "messages" list; {place} has none{keys}.'
        )
    if render is None:
        raise InputError(
            f'{place} holds "messages", but the model has no chat template to apply: give "text".'
        )
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InputError(f'"tools" must be a list, but in {place} it is {_kind(tools)}.')
    plain = [_message(message, place) for message in messages]
    try:
        return render(plain, tools or None)
    except Exception as error:  # a template is a program of the model's authors
        raise InputError(f"the model's chat template refuses {place}: {error}.") from error


def _message(message: Any, place: str) -> dict[str, Any]:
    """Return a message whose content is one text, as templates of language models want it.

    Raises:
        InputError: It has no role, or its content is something else than text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f'a message is an object with a "role"; one in {place} is not.')
    content = message.get("content")
    if content is None or isinstance(content, str):  # None: a call of tools alone
        return dict(message)
    if not isinstance(content, list):
        raise InputError(
            f'the "content" of a message is text or a list of parts; in {place} it is '
            f"{_kind(content)}."
        )
    texts = [part if isinstance(part, str) else _part(part, place) for part in content]
    return {**message, "content": "".join(texts)}


def _part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) else None
    if not isinstance(text, str):
        kind = part.get("type", "nothing known") if isinstance(part, dict) else _kind(part)
        raise InputError(
            f'of the parts of a message only those of type "text" can be read, but {place} has '
            f"{kind!r}. Leave such conversations out."
        )
    return text


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
