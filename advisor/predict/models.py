"""Which model the user means: a folder, a name of the catalogue, or a Hugging Face id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from advisor.errors import InputError, did_you_mean
from advisor.modelspec import ModelSpec, build_modelspec, read_model_folder
from advisor.plan.data import data_files
from advisor.plan.schema import Strict

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
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
    folder = Path(name).expanduser()
    if folder.is_dir():
        return read_model_folder(folder, model_id=name)
    if folder.is_file():
        raise InputError(
            f"{name} is a file. Give the model's folder, with config.json, a Hugging Face id, or a "
            "name of `advisor profiles list`; `advisor inspect` says what a GGUF file holds."
        )
    path = find_model_file(name)
    if path is not None:
        return _from_catalogue(path, name)
    if folder.is_absolute() or name.startswith((".", "~")) or name.endswith(("/", os.sep)):
        raise InputError(f"no such model folder: {name}. Check the path.")
    known = list_models()
    short = {identity.rpartition("/")[2]: identity for identity in known}
    hint = did_you_mean(name, known) or did_you_mean(name, short)
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


def _from_catalogue(path: Path, name: str) -> ModelSpec:
    profile = load_profile(path)
    # A fine-tuned model keeps its own id: that is what will be served.
    same = [alias for alias in profile.aliases if "/" in alias and _plain(alias) == _plain(name)]
    return build_modelspec(
        profile.config,
        model_id=same[0] if same else profile.id,
        source="catalogue",
        where=path.name,
        stored_untied=profile.stored_untied,
    )


def _id_of(path: Path) -> str:
    return path.stem.replace("--", "/", 1)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-")


def _aliases(path: Path, wanted: str) -> set[str]:
    """Return a file's aliases, or nothing where the wanted name cannot be among them."""
    # Aliases stand on one line near the top, so that no file must be parsed to find a name.
    with open(path, "rb") as file:
        text = file.read(4096)
    if wanted.encode() not in text.lower().replace(b"_", b"-"):
        return set()
    match = _ALIASES.search(text.decode("utf-8", "replace"))
    if match is None:
        return set()
    return {_plain(alias.strip(" \"'\n")) for alias in match["names"].split(",")}
