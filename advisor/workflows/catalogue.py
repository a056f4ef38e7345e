"""``profiles``: list, show and check what is known of hardware, models and engines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from advisor.errors import InputError, did_you_mean
from advisor.plan.data import KINDS, data_files, folder_files

if TYPE_CHECKING:
    from collections.abc import Callable

_KINDS = ("hardware", "models", "engines")


def list_profiles(kind: str = "all") -> dict[str, Any]:
    """Return what the catalogue knows, a row a profile.

    Args:
        kind: ``hardware``, ``models``, ``engines`` or ``all``.

    Raises:
        InputError: Unknown kind, or a broken profile.
    """
    if kind != "all" and kind not in _KINDS:
        raise InputError(
            f"profiles are of the kinds {', '.join(_KINDS)}, but got {kind!r}."
            f"{did_you_mean(kind, (*_KINDS, 'all'))}"
        )
    tables: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "hardware": _hardware,
        "models": _models,
        "engines": _engines,
    }
    chosen = _KINDS if kind == "all" else (kind,)
    return {"schema_version": 1} | {name: tables[name]() for name in chosen}


def show_profile(name: str) -> dict[str, Any]:
    """Return one profile as its file holds it.

    Raises:
        InputError: No device, model or engine of that name.
    """
    from advisor.engines import engine_names

    if name.lower() in engine_names():
        return _file("engines", name.lower())
    from advisor.predict.models import find_model

    found = find_model(name)
    if found is not None:
        return _document("models", found[0])
    from advisor.hardware.catalogue import find_profile

    try:
        return _file("hardware", find_profile(name).id)
    except InputError as error:
        known = [*engine_names(), *(row["id"] for row in (*_hardware(), *_models()))]
        if "must be one of the catalogue" not in str(error):  # several devices of that name
            raise
        raise InputError(
            f"no device, model or engine is called {name!r}.{did_you_mean(name, known)} "
            "`advisor profiles list` shows all."
        ) from error


def check_profiles(folder: str | Path) -> dict[str, Any]:
    """Check a folder of profiles; every fault is a sentence that names its file.

    Raises:
        InputError: No such folder.
    """
    place = Path(folder)
    if not place.is_dir():
        raise InputError(
            f"no folder at {place}. Give one with hardware/, models/ or engines/ in it."
        )
    from advisor.engines.rules import load_engine_file
    from advisor.hardware.catalogue import check_profiles as check_hardware
    from advisor.predict.models import load_profile

    faults = list(check_hardware(place))
    checks: tuple[tuple[str, Callable[[Path], object]], ...] = (
        ("models", load_profile),
        ("engines", load_engine_file),
    )
    for kind, check in checks:
        for path in folder_files(place, kind):
            try:
                check(path)
            except InputError as error:
                faults.append(str(error))
    checked = sum(len(folder_files(place, kind)) for kind in KINDS)
    if not checked:
        faults.append(
            f"{place} holds no profile. Put YAML files into {place}/hardware, /models or /engines."
        )
    return {"schema_version": 1, "folder": str(place), "checked": checked, "faults": faults}


def _hardware() -> list[dict[str, str]]:
    from advisor.hardware.catalogue import list_profiles as profiles

    rows = []
    for profile in profiles():
        memory = "" if profile.memory_bytes is None else f"{profile.memory_bytes / 2**30:.0f} GiB"
        capability = "" if profile.sm is None else f"sm_{profile.sm}"
        bandwidth = "" if profile.bandwidth_gb_s is None else f"{profile.bandwidth_gb_s:.0f} GB/s"
        note = ", ".join(part for part in (memory, bandwidth, capability) if part)
        rows.append({"id": profile.id, "name": profile.name, "note": note})
    return rows


def _models() -> list[dict[str, Any]]:
    """Return id, architecture and number of parameters, None where the shapes are not known."""
    from advisor.predict.models import find_model_file, list_models, load_modelspec, load_profile

    rows = []
    for identifier in list_models():
        path = find_model_file(identifier)
        if path is None:  # removed between the two calls
            continue
        profile = load_profile(path)
        architecture = str(profile.config.get("architectures", ["unknown"])[0])
        parameters, note = None, ""
        try:
            parameters = load_modelspec(identifier).parameters
        except InputError as error:  # a profile of one's own, of shapes that cannot be told
            note = str(error)
        rows.append(
            {"id": profile.id, "name": architecture, "parameters": parameters, "note": note}
        )
    return rows


def _engines() -> list[dict[str, str]]:
    from advisor.engines import engine_names, load_engine

    return [
        {"id": name, "name": engine.title, "note": f"{len(engine.kernels)} kernel rules"}
        for name, engine in ((name, load_engine(name)) for name in engine_names())
    ]


def _file(kind: str, identifier: str) -> dict[str, Any]:
    matches = [path for path in data_files(kind) if path.stem == identifier]
    return _document(kind, matches[-1])


def _document(kind: str, path: Path) -> dict[str, Any]:
    profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"schema_version": 1, "kind": kind, "path": str(path), "profile": profile}
