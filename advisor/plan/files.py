"""Read and write plans: strict YAML in, readable YAML out, never half a file."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from advisor.errors import InputError, did_you_mean, join_errors
from advisor.plan.schema import PLAN_VERSION, Plan

if TYPE_CHECKING:
    from pathlib import Path

_HEADER = (
    "# A quantization plan. `advisor apply` makes the checkpoint it describes,\n"
    "# `advisor verify` checks a checkpoint against it.\n"
)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a killed run leaves the old file or the new one.

    A new file is readable by whom the umask says, as any other: what serves a checkpoint is often
    another user than who made it.

    Raises:
        InputError: The folder is missing or cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        opened = temporary.open("xb")
    except OSError as error:
        raise InputError(
            f"the folder of {path} must be writable, but {error.strerror}: {path.parent}. "
            "Name another output."
        ) from error
    try:
        with opened as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{path} could not be written: {error.strerror}. Nothing was changed; "
            "free some space or name another output."
        ) from error


def dump_plan(plan: Plan) -> str:
    """Return a plan as YAML, in the order of the schema; what is not known is left out."""
    document = plan.model_dump(mode="json", exclude_none=True)
    for part in (document, document["expected"]):
        if not part.get("slices"):
            part.pop("slices", None)
    if not document["fallbacks"]:
        del document["fallbacks"]
    if not document["scheme"]["outer"]:
        del document["scheme"]["outer"]
    search = document.get("search", {})
    for name in ("best", "passed_over"):
        if not search.get(name):
            search.pop(name, None)
    body: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    return _HEADER + body


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan atomically.

    Raises:
        InputError: The place cannot be written.
    """
    write_atomically(path, dump_plan(plan))


def load_plan(path: Path) -> Plan:
    """Read and validate a plan.

    Raises:
        InputError: Missing file, broken YAML, unknown key (the nearest known one is named),
            wrong value, or a plan of a newer version.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"no plan at {path}. Make one with: advisor tune MODEL -o {path}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the plan {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}, column {place.column + 1}" if place else ""
        raise InputError(
            f"the plan {path} is not valid YAML{where}: {getattr(error, 'problem', error)}."
        ) from error
    if not isinstance(document, dict):
        raise InputError(f"the plan {path} must be a YAML mapping, but it is {_kind(document)}.")
    version = document.get("plan_version")
    if isinstance(version, int) and version > PLAN_VERSION:
        raise InputError(
            f"the plan {path} has plan_version {version}, but this Advisor reads up to "
            f"{PLAN_VERSION}. Upgrade Advisor, or make the plan again."
        )
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise InputError(
            f"the plan {path} is not valid. {join_errors(_complaints(error))}"
        ) from error


def _kind(document: Any) -> str:
    return "empty" if document is None else f"a {type(document).__name__}"


def _complaints(error: ValidationError) -> list[str]:
    """Turn pydantic's findings into lines that name the key, the value and the nearest key."""
    lines = []
    for finding in error.errors():
        path = ".".join(str(part) for part in finding["loc"])
        if finding["type"] == "extra_forbidden":
            known = _keys_at(Plan, finding["loc"][:-1])
            name = str(finding["loc"][-1])
            lines.append(f"unknown key {path!r}.{did_you_mean(name, known)}")
        elif finding["type"] == "missing":
            lines.append(f"the key {path!r} is missing.")
        else:
            lines.append(f"{path}: {finding['msg'].lower()}, but got {finding.get('input')!r}.")
    return lines


def _keys_at(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Keys that the schema knows at a path."""
    current: type[BaseModel] = model
    for part in path:
        field = current.model_fields.get(str(part))
        if field is None:
            continue
        nested = [field.annotation, *_nested(field.annotation)]
        found = [kind for kind in nested if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if found:
            current = found[0]
    return list(current.model_fields)


def _nested(annotation: Any) -> list[Any]:
    parts: list[Any] = []
    for argument in get_args(annotation):
        parts.extend([argument, *_nested(argument)])
    return parts
