"""Which model the user means: a folder, a name of the catalogue, or a Hugging Face id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError

from advisor.errors import InputError, did_you_mean
from advisor.modelspec import ModelSpec, build_modelspec, read_model_folder
from advisor.plan.data import data_files
from advisor.plan.schema import Strict
from advisor.predict.everyday import everyday_matches, family_members

if TYPE_CHECKING:
    from collections.abc import Iterable

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
_TOP_BYTES = 4096
_LISTED = 4
_ALIASES = re.compile(r"^aliases:\s*\[(?P<names>[^\]]*)\]", re.MULTILINE)


class Published(Strict):
    """The number of parameters that the publisher's files hold."""

    parameters: int = Field(gt=0)
    source: str


class ModelProfile(Strict):
    """One file of ``profiles/models``.

    Attributes:
        id: Hugging Face id.
        aliases: Other ids with the same architecture: fine-tuned and renamed ones.
        config: config.json as far as it decides tensors and cache.
        stored_untied: Whether the publisher's file repeats a tied head.
        published: Published number of parameters, for checks.
        sources: Where the configuration came from.
        notes: What a reader should know.
    """

    id: str
    aliases: tuple[str, ...] = ()
    config: dict[str, Any]
    stored_untied: bool = False
    published: Published | None = None
    sources: tuple[str, ...] = Field(min_length=1)
    notes: str = ""


def load_modelspec(model: str | os.PathLike[str]) -> ModelSpec:
    """Describe a model.

    Args:
        model: A folder, a name of the catalogue (``profiles/models``, in any case), or a Hugging
            Face id, of which only config.json and the safetensors headers are fetched.

    Raises:
        InputError: Nothing of that name, or what was found cannot be described.
    """
    name = os.fspath(model)
    if not name.strip():
        raise InputError(
            f"the model must be named, but got {name!r}. Give a folder, a Hugging Face id "
            "(organisation/name), or a name of `advisor profiles list`."
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_model_folder(folder, model_id=name)
    if folder.is_file():
        raise InputError(
            f"{name} is a file. Give the model's folder, with config.json, a Hugging Face id, or a "
            "name of `advisor profiles list`; `advisor inspect` says what a GGUF file holds."
        )
    found = find_model(name)
    if found is not None:
        return _from_catalogue(*found)
    if folder.is_absolute() or name.startswith((".", "~")) or name.endswith(("/", os.sep)):
        raise InputError(f"no such model folder: {name}. Check the path.")
    known = list_models()
    short = {identity.rpartition("/")[2]: identity for identity in known}
    hint = _family_hint(name, known) or did_you_mean(name, known) or did_you_mean(name, short)
    if not _HUB_ID.fullmatch(name):
        raise InputError(
            f"unknown model {name!r}: no folder and no name of the catalogue.{hint} "
            "Give a folder, a Hugging Face id (organisation/name), or a name of "
            "`advisor profiles list`."
        )
    from advisor.predict.hub import fetch_modelspec

    return fetch_modelspec(name, hint)


def list_models() -> tuple[str, ...]:
    """Return the ids of the catalogue, sorted; files are not opened."""
    return tuple(sorted({_id_of(path) for path in data_files("models")}, key=str.lower))


def load_profile(path: Path) -> ModelProfile:
    """Read one file of the catalogue.

    Raises:
        InputError: Broken YAML, an unknown key, or a missing one.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the model profile {path}: {error}.") from error
    try:
        return ModelProfile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        hint = did_you_mean(key, ModelProfile.model_fields)
        raise InputError(
            f"{path}: {error.error_count()} problems; {key or 'the file'}: {first['msg']}.{hint}"
        ) from error


def find_model_file(name: str) -> Path | None:
    """Return the catalogue's file for a name, None where there is none.

    A full id or alias wins over the part after the slash; a user's folder over the shipped one.

    Raises:
        InputError: The short name means several models.
    """
    wanted = _plain(name)
    files = {_plain(_id_of(path)): path for path in data_files("models")}
    if wanted in files:
        return files[wanted]
    shorts = [path for key, path in files.items() if key.rpartition("/")[2] == wanted]
    if not shorts:
        by_alias = {path: _aliases(path, wanted) for path in files.values()}
        shorts = [path for path, names in by_alias.items() if wanted in names]
        shorts = shorts or [
            path
            for path, names in by_alias.items()
            if wanted in {alias.rpartition("/")[2] for alias in names}
        ]
    if len(shorts) > 1:
        ids = ", ".join(_id_of(path) for path in shorts)
        raise InputError(f"model name {name!r} means several: {ids}. Give the whole id.")
    return shorts[0] if shorts else None


def find_model(name: str) -> tuple[Path, str] | None:
    """Return the catalogue's file for a name, also an everyday one, and the id that it means.

    ``gemma-3-12b`` is ``google/gemma-3-12b-it``: see
    :func:`advisor.predict.everyday.everyday_matches`.

    Raises:
        InputError: The name means models of several architectures.
    """
    path = find_model_file(name)
    if path is not None:
        return path, _id_meant(path, name)
    if "/" in name or os.sep in name:
        return None
    homes = {identity: path for path in data_files("models") for identity in _all_ids(path)}
    nearest: dict[Path, str] = {}
    for identity in everyday_matches(name, homes):
        nearest.setdefault(homes[identity], identity)
    if len(nearest) > 1:
        raise InputError(
            f"model name {name!r} means several: {', '.join(nearest.values())}. Give the whole id."
        )
    return next(iter(nearest.items()), None)


def name_notes(name: str | os.PathLike[str]) -> tuple[str, ...]:
    """Say which model of the catalogue an everyday name was taken for; nothing for an exact one.

    Raises:
        InputError: The name means several.
    """
    text = os.fspath(name)
    if Path(text).expanduser().exists() or find_model_file(text) is not None:
        return ()
    found = find_model(text)
    if found is None:
        return ()
    return (
        f"{text!r} was taken for {found[1]}; base and tuned models of one shape get the same "
        "advice.",
    )


def _family_hint(name: str, known: Iterable[str]) -> str:
    members = family_members(name, known)
    if not members:
        return ""
    more = f" and {len(members) - _LISTED} more" if len(members) > _LISTED else ""
    return f" The catalogue has {', '.join(members[:_LISTED])}{more}."


def _from_catalogue(path: Path, identity: str) -> ModelSpec:
    profile = load_profile(path)
    return build_modelspec(
        profile.config,
        model_id=identity,
        source="catalogue",
        where=path.name,
        stored_untied=profile.stored_untied,
    )


def _id_of(path: Path) -> str:
    return path.stem.replace("--", "/", 1)


def _id_meant(path: Path, name: str) -> str:
    """Return the id of a file, or that of the fine-tuned model that was named: it is served."""
    wanted, alone = _plain(name), "/" not in name
    for alias in _all_ids(path):
        if wanted == _plain(alias.rpartition("/")[2] if alone else alias):
            return alias
    return _id_of(path)


def _all_ids(path: Path) -> list[str]:
    """Return a file's id and its aliases that are ids."""
    return [_id_of(path), *(alias for alias in _written_aliases(path) if "/" in alias)]


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _aliases(path: Path, wanted: str) -> set[str]:
    """Return a file's aliases, or nothing where the wanted name cannot be among them."""
    with open(path, "rb") as file:
        text = file.read(_TOP_BYTES)
    if wanted.encode() not in text.lower().replace(b"_", b"-"):
        return set()
    return {_plain(alias) for alias in _written_aliases(path)}


def _written_aliases(path: Path) -> list[str]:
    """Return a file's aliases as they stand there."""
    # They stand on one line near the top, so that no file must be parsed to find a name.
    with open(path, "rb") as file:
        match = _ALIASES.search(file.read(_TOP_BYTES).decode("utf-8", "replace"))
    if match is None:
        return []
    return [alias.strip(" \"'\n") for alias in match["names"].split(",")]
