"""What people type for a card, taken apart: ``2x A100 80GB PCIe`` is (a100, pcie, 80 GiB) twice."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from advisor.errors import InputError

# "2x4090", "2 x 4090", "2*4090"; not "7900 xtx", not "4090x2".
_COUNT_BEFORE = re.compile(r"^(\d{1,3})(?:x\s*|\s+x\s+|\s*\*\s*)(?=\S)")
_COUNT_AFTER = re.compile(r"(?:\s+[x*]\s*|(?<=\d)x|\*)(\d{1,3})$")
_MEMORY = re.compile(r"(?<![a-z0-9])(\d{1,4})\s*(?:gib|gb|g)(?![a-z0-9])")
_MEMORY_ALONE = re.compile(r"^\d{1,3}$")
_MEMORY_TYPE = re.compile(r"(?<![a-z0-9])(hbm\d?e?|l?p?g?ddr\d?x?)(?![a-z0-9])")
_BUS = re.compile(r"(?<![a-z])(sxm\d?|pcie|pci-e|oam)(?![a-z0-9])|(?<=\d)(sxm\d?|pcie)(?![a-z0-9])")
_NOISE = re.compile(r"\b(gpus?|card|graphics|accelerator|generation|tensor[ -]core|\(r\)|\(tm\))\b")
_BRANDS = re.compile(r"^(nvidia|geforce|tesla|amd|radeon|instinct|intel|rtx)")


@dataclass(frozen=True, slots=True)
class ParsedName:
    """A card's name in comparable parts.

    Attributes:
        base: Letters and digits of the name without brand, bus and memory, as ``4090``.
        bus: ``sxm``, ``sxm4``, ``pcie``, ``oam`` or None where the name does not say.
        memory_gib: Memory that the name states.
        memory_type: ``hbm3``, ... or None where the name does not say.
    """

    base: str
    bus: str | None = None
    memory_gib: int | None = None
    memory_type: str | None = None


def split_count(text: str) -> tuple[str, int]:
    """Split ``2x RTX 4090`` or ``RTX 4090 x2`` into the name and the count (1 without one).

    Raises:
        InputError: The count is 0.
    """
    cleaned = _plain(text)
    if found := _COUNT_BEFORE.match(cleaned):
        rest = cleaned[found.end() :]
    elif found := _COUNT_AFTER.search(cleaned):
        rest = cleaned[: found.start()]
    else:
        return cleaned, 1
    count = int(found.group(1))
    if count < 1:
        raise InputError(
            f"The number of GPUs must be at least 1, but got {count} in {text!r}. "
            f"Type for example '2x {rest.strip()}'."
        )
    return rest.strip(), count


def parse_name(text: str) -> ParsedName:
    """Take a name apart; every letter and digit of it ends up in one of the parts.

    Nothing is ignored but brand words and words like "graphics card", so that ``RTX 4090 Laptop``
    and ``RTX 4090 D`` never equal ``RTX 4090``.
    """
    rest = _NOISE.sub(" ", _plain(text))
    rest, kind = _take(_MEMORY_TYPE, rest)
    rest, memory = _take(_MEMORY, rest)
    rest, bus = _take(_BUS, rest)
    words = re.findall(r"[a-z0-9]+", rest)
    if memory is None and len(words) > 1 and _MEMORY_ALONE.match(words[-1]):
        # "a100 80": a bare number after the name.
        memory = words.pop()
    base = "".join(words)
    while (shorter := _BRANDS.sub("", base)) != base and shorter:
        base = shorter
    return ParsedName(
        base=base,
        bus="pcie" if bus == "pci-e" else bus,
        memory_gib=None if memory is None else int(memory),
        memory_type=kind,
    )


def _plain(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).lower().replace("×", "x").replace("_", " ")
    return " ".join(folded.split())


def _take(pattern: re.Pattern[str], text: str) -> tuple[str, str | None]:
    found = pattern.search(text)
    if found is None:
        return text, None
    value = next((group for group in found.groups() if group), None)
    return text[: found.start()] + " " + text[found.end() :], value
