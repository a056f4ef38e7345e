"""Where the data files are: the package's own profiles, and folders that the user adds."""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from advisor.errors import AdvisorError, InputError, join_errors

if TYPE_CHECKING:
    from collections.abc import Iterable

KINDS: tuple[str, ...] = ("hardware", "engines", "models", "evidence")
"""Sub-folders of a profiles folder."""

ENVIRONMENT_VARIABLE = "ADVISOR_PROFILES"
"""Folders of one's own, separated as in PATH; ``--profiles DIR`` adds further ones."""

_YAML = (".yaml", ".yml")
_HARDWARE_LINE = re.compile(r"^(figures:|kind:\s*[\"']?(gpu|cpu)\b)", re.MULTILINE)
_extra: tuple[Path, ...] = ()


def profiles_folder() -> Path:
    """Return the folder of the profiles that Advisor ships.

    An installed wheel holds it inside the package (``advisor/_profiles``); in a checkout it lies
    beside the package (``profiles/``).

    Raises:
        AdvisorError: Neither exists: the installation is incomplete.
    """
    return _profiles_beside(__file__)


@cache
def _profiles_beside(file: str) -> Path:
    package = Path(file).resolve().parents[1]
    choices = (package / "_profiles", package.parent / "profiles")
    for folder in choices:
        if (folder / "hardware").is_dir():
            return folder
    raise AdvisorError(
        "The profiles of hardware, engines and models must come with the package, but neither "
        f"{choices[0]} nor {choices[1]} exists. Install quantization-advisor again."
    )


def set_extra_folders(folders: Iterable[str | Path]) -> None:
    """Set the folders of ``--profiles``; they replace the ones set before.

    Args:
        folders: Folders with ``hardware/``, ``engines/``, ``models/`` or ``evidence/`` in them, or
            with hardware profiles directly in them. Later ones win over earlier ones.

    Raises:
        InputError: A folder does not exist; nothing is changed then.
    """
    global _extra
    chosen = tuple(Path(folder).expanduser() for folder in folders)
    _check_folders(chosen, "--profiles")
    _extra = chosen


def folders_of_option() -> tuple[Path, ...]:
    """Return the folders of ``--profiles``, which a command that follows needs, too."""
    return _extra


def extra_folders() -> tuple[Path, ...]:
    """Return the user's folders, weakest first: $ADVISOR_PROFILES, then ``--profiles``.

    Raises:
        InputError: A folder named in $ADVISOR_PROFILES does not exist.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE, "")
    given = tuple(Path(part).expanduser() for part in named.split(os.pathsep) if part.strip())
    _check_folders(given, f"${ENVIRONMENT_VARIABLE}")
    return given + tuple(folder for folder in _extra if folder not in given)


def data_folders(kind: str) -> tuple[Path, ...]:
    """Return every existing sub-folder of this kind, the shipped one first, the strongest last.

    Args:
        kind: ``hardware``, ``engines``, ``models`` or ``evidence``.
    """
    roots = (profiles_folder(), *extra_folders())
    return tuple(root / kind for root in roots if (root / kind).is_dir())


def data_files(kind: str) -> tuple[Path, ...]:
    """Return the YAML files of this kind, sorted by name within a folder, strongest folder last.

    A user's folder may also hold hardware profiles directly, without the ``hardware`` sub-folder.
    """
    files = folder_files(profiles_folder(), kind)
    for folder in extra_folders():
        files += folder_files(folder, kind)
    return files


def folder_files(folder: Path, kind: str) -> tuple[Path, ...]:
    """Return the YAML files of one profiles folder that are of this kind, sorted by name."""
    files = _yaml_files(folder / kind)
    if kind == "hardware":
        files += tuple(path for path in _yaml_files(folder) if _is_hardware(path))
    return files


def unplaced_files(folder: Path) -> tuple[Path, ...]:
    """Return the YAML files directly in ``folder`` whose kind cannot be told."""
    return tuple(path for path in _yaml_files(folder) if not _is_hardware(path))


def _yaml_files(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        return ()
    with os.scandir(folder) as entries:
        names = sorted(
            entry.name
            for entry in entries
            if entry.name.endswith(_YAML) and not entry.name.startswith(".")
        )
    return tuple(folder / name for name in names)


def _is_hardware(path: Path) -> bool:
    try:
        return _HARDWARE_LINE.search(path.read_text(encoding="utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        # Unreadable: leave it among the unplaced ones, which `advisor profiles check` reports.
        return False


def _check_folders(folders: tuple[Path, ...], origin: str) -> None:
    missing = [
        f"{origin} must name existing folders, but there is no folder {str(folder)!r}. "
        "Create it or correct the path."
        for folder in folders
        if not folder.is_dir()
    ]
    if missing:
        raise InputError(join_errors(missing))
