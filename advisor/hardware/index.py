"""The names of every profile, read without their figures: fast enough for each command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

from advisor.errors import InputError, join_errors
from advisor.hardware.names import ParsedName, parse_name
from advisor.plan.data import data_files

if TYPE_CHECKING:
    from pathlib import Path

# The C loader is ten times as fast; both are the safe loader.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NAME_KEYS = ("id", "name", "aliases", "shared_names", "other_variants")
_NAME_LINE = re.compile(rf"^({'|'.join(_NAME_KEYS)}):", re.MULTILINE)
_FIGURES_LINE = re.compile(r"^figures:", re.MULTILINE)
_MEMORY_LINE = re.compile(r"^  memory_gib:\s*\{?\s*(?:value:)?\s*([\d.]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A profile's names, read without its figures.

    Attributes:
        id: Identifier, also the file's name.
        name: Full name.
        path: The YAML file.
        names: What :func:`parse_name` makes of the identifier, the name and the aliases.
        shared: Names that fit this device and others.
        variants: Devices of the same name without a profile: as typed, and taken apart.
        memory_gib: Nominal memory, if known.
        order: Place of the file; files of stronger folders come later.
    """

    id: str
    name: str
    path: Path
    names: tuple[ParsedName, ...]
    shared: tuple[ParsedName, ...]
    variants: tuple[tuple[str, ParsedName], ...]
    memory_gib: float | None
    order: int

    @property
    def spellings(self) -> tuple[str, ...]:
        """What to suggest for a mistyped name."""
        return (self.id, self.name)


def catalogue_entries() -> tuple[Entry, ...]:
    """Return every card's names; a user's profile replaces a shipped one of the same identifier.

    Raises:
        InputError: A file's names cannot be read.
    """
    files = data_files("hardware")
    return _entries(tuple((path, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=4)
def _entries(files: tuple[tuple[Path, int], ...]) -> tuple[Entry, ...]:
    found: dict[str, Entry] = {}
    folders: dict[Path, int] = {}
    for path, _ in files:
        order = folders.setdefault(path.parent, len(folders))
        entry = _read_entry(path, order)
        found[entry.id] = entry
    return tuple(found.values())


def _read_entry(path: Path, order: int) -> Entry:
    text = _read_text(path)
    figures = _FIGURES_LINE.search(text)
    if figures and not _NAME_LINE.search(text, figures.start()):
        content = _parse(path, text[: figures.start()])
    else:
        # A file in another order than ours: read all of it.
        content = read_mapping(path)
    if not isinstance(content, dict):
        content = {}
    faults = [
        f"{path}: {key} must be {'a text' if key in ('id', 'name') else 'a list of texts'}"
        for key in _NAME_KEYS
        if not _is_text(content.get(key), single=key in ("id", "name"))
    ]
    if faults:
        raise InputError(join_errors(faults) + ". Run `advisor profiles check` on its folder.")
    memory = _MEMORY_LINE.search(text)
    return Entry(
        id=content["id"],
        name=content["name"],
        path=path,
        names=tuple(
            dict.fromkeys(
                parse_name(name)
                for name in (content["id"], content["name"], *content.get("aliases", ()))
            )
        ),
        shared=tuple(parse_name(name) for name in content.get("shared_names", ())),
        variants=tuple((name, parse_name(name)) for name in content.get("other_variants", ())),
        memory_gib=float(memory.group(1)) if memory else None,
        order=order,
    )


def _is_text(value: object, *, single: bool) -> bool:
    if single:
        return isinstance(value, str)
    return value is None or (
        isinstance(value, list) and all(isinstance(item, str) for item in value)
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"A profile must be a readable UTF-8 file, but {path}: {error}."
        ) from error


def _parse(path: Path, text: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"A profile must be valid YAML, but {path}: {reason}.") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read a profile's YAML without validating it.

    Raises:
        InputError: The file is unreadable, no YAML or no mapping.
    """
    content = _parse(path, _read_text(path))
    if not isinstance(content, dict):
        raise InputError(
            f"A profile must be a YAML mapping with id, name, vendor and kind, but {path} holds "
            f"{type(content).__name__}."
        )
    return content
