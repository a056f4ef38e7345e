"""Rebuild the built-in text (advisor/calibration/texts) from the Python that runs this script.

    python3.11 examples/build_corpus.py OUTPUT

The shipped copy was made by CPython 3.11.7 and stays fixed; other versions have other text. Topics
that mostly repeat a longer one are dropped; the others go to a part by the hash of their name
(`advisor.calibration.corpora.builtin_part`), and the two parts may share no 16 words in a row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from advisor.calibration.corpora import builtin_part

SHINGLE_WORDS = 16


def shingles(text: str, words: int = SHINGLE_WORDS) -> set[tuple[str, ...]]:
    """Return every run of so many words in the text."""
    split = text.split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def without_repeats(texts: dict[str, str]) -> dict[str, str]:
    """Drop each text of which more than half stands in the longer ones already kept."""
    kept: dict[str, str] = {}
    seen: set[tuple[str, ...]] = set()
    for topic in sorted(texts, key=lambda topic: (-len(texts[topic]), topic)):
        here = shingles(texts[topic])
        if len(here & seen) <= len(here) / 2:
            kept[topic] = texts[topic]
            seen |= here
    return dict(sorted(kept.items()))


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="folder for calibration.txt and evaluation.txt")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)

    parts: dict[str, str] = {"calibration": "", "evaluation": ""}
    for topic, text in without_repeats(topics).items():
        parts[builtin_part(topic)] += f"\f{topic}\n{text.rstrip()}\n"
    shared = shingles(parts["calibration"]) & shingles(parts["evaluation"])
    if shared:
        raise SystemExit(f"the parts share {len(shared)} runs of {SHINGLE_WORDS} words")
    for part, text in parts.items():
        (output / f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")
        print(f"{part}: {text.count(chr(12))} topics, {len(text):,} characters")


if __name__ == "__main__":
    main()
