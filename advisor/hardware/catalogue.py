"""The catalogue of hardware: finding a profile by what people call it, and checking profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.hardware.index import catalogue_entries, read_mapping
from advisor.hardware.matching import find_entry
from advisor.hardware.names import ParsedName, parse_name, split_count
from advisor.plan.data import extra_folders, folder_files, profiles_folder, unplaced_files

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import ValidationError

    from advisor.hardware.profile import HardwareProfile


def find_profile(name: str) -> HardwareProfile:
    """Find the profile of a card by what people call it.

    Brand words, case, spaces and hyphens do not matter; every other word does. ``2x`` in front or
    ``x2`` behind sets the count. A name may leave out bus (PCIe, SXM) and memory. The rule: a name
    is accepted when all cards that it fits, those known to exist without a profile included, are
    one card, or cards whose figures differ in power alone (then the one of less power). Otherwise
    the error asks which. ``A100`` asks (40 or 80 GB), ``3060`` asks (8 or 12 GB), ``L4`` is never
    the L40S, and a word that no card has (``4090 Laptop``, ``4090 48GB``) is an unknown card.

    A profile of the user's with the same identifier replaces the shipped one, and one whose name
    or alias is exactly what was typed goes before others.

    Args:
        name: For example ``rtx-4090``, ``A100 80GB PCIe``, ``2x RTX 4090``, or an identifier.

    Raises:
        InputError: The name fits no card or several, or the chosen file breaks the schema.
    """
    wanted, count = split_count(name)
    profile = load_profile(_shipped_file(wanted) or find_entry(wanted).path)
    return profile if count == 1 else profile.model_copy(update={"count": count})


def _shipped_file(identifier: str) -> Path | None:
    """Return the file of an exact identifier, without reading the names of all other cards.

    Only where the user added no folder: theirs may give a name of its own meaning.
    """
    slug = identifier.strip().lower()
    if extra_folders() or not slug.replace("-", "").isalnum():
        return None
    path = profiles_folder() / "hardware" / f"{slug}.yaml"
    return path if path.is_file() else None


def list_profiles() -> tuple[HardwareProfile, ...]:
    """Load every profile, sorted by vendor and identifier.

    Raises:
        InputError: A file breaks the schema; all broken ones are listed.
    """
    faults: list[str] = []
    profiles = []
    for entry in catalogue_entries():
        try:
            profiles.append(load_profile(entry.path))
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError(join_errors(faults))
    return tuple(sorted(profiles, key=lambda profile: (profile.vendor, profile.id)))


def load_profile(path: Path) -> HardwareProfile:
    """Read and validate one profile.

    Raises:
        InputError: The file is unreadable, no YAML, or breaks the schema; every fault is named.
    """
    from pydantic import ValidationError

    from advisor.hardware.profile import HardwareProfile

    content = read_mapping(path)
    try:
        profile = HardwareProfile.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(path, error)) from error
    if profile.id != path.stem:
        raise InputError(
            f"A profile's id must be its file's name, but {path} has id {profile.id!r}. "
            f"Rename the file to {profile.id}.yaml or set id: {path.stem}."
        )
    return profile


def check_profiles(folder: Path) -> tuple[str, ...]:
    """Return every fault of the hardware profiles in a folder, an empty tuple if there is none.

    Args:
        folder: A profiles folder: with a ``hardware`` sub-folder, or the YAML files directly.
    """
    if not folder.is_dir():
        return (f"There is no folder {str(folder)!r}.",)
    faults = [
        f"{path}: neither 'kind: gpu' nor 'kind: cpu' nor figures, so its kind cannot be told. "
        "Move it into a sub-folder: hardware, models or engines."
        for path in unplaced_files(folder)
    ]
    owners: dict[ParsedName, str] = {}
    for path in folder_files(folder, "hardware"):
        try:
            profile = load_profile(path)
        except InputError as error:
            faults.append(str(error))
            continue
        for name in (profile.id, profile.name, *profile.aliases):
            owner = owners.setdefault(parse_name(name), profile.id)
            if owner != profile.id:
                faults.append(
                    f"{path}: the name {name!r} is also that of {owner}. A name must be one "
                    "device's; put a name of several under shared_names."
                )
    return tuple(faults)


def _explain(path: Path, error: ValidationError) -> str:
    from advisor.hardware.profile import FIGURE_NAMES, HardwareProfile

    known = {*HardwareProfile.model_fields, *FIGURE_NAMES, "value", "grade", "source"}
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            unknown = str(fault["loc"][-1])
            lines.append(f"{path}: unknown key {key!r}.{did_you_mean(unknown, known)}")
        elif fault["type"] == "missing":
            lines.append(f"{path}: {key} is missing.")
        else:
            given = "" if isinstance(fault["input"], dict) else f", but got {fault['input']!r}"
            lines.append(f"{path}: {key or 'profile'}: {fault['msg']}{given}.")
    return join_errors(lines)
