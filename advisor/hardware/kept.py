"""What ``advisor profile --measure`` found on this machine, kept for later advice."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from advisor.errors import InputError
from advisor.hardware.profile import Figure

if TYPE_CHECKING:
    from pathlib import Path

    from advisor.hardware.measure import Measurements
    from advisor.hardware.profile import HardwareProfile

_FILE = "measured.json"


def keep_measurements(measurements: Measurements, folder: Path) -> Path:
    """Write what was measured of a device, beside what is kept of others, and return the file.

    Raises:
        InputError: The folder cannot be written, or the file there is damaged.
    """
    file = folder / _FILE
    kept = _read(file)
    kept[measurements.name] = {
        "source": f"advisor profile --measure, torch {measurements.torch_version}",
        "figures": {
            item.quantity: item.value for item in measurements.measured if item.value is not None
        },
    }
    temporary = file.with_name(f"{_FILE}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise InputError(
            f"what was measured cannot be kept in {file}: {error.strerror}. Set ADVISOR_CACHE to a "
            "folder that can be written."
        ) from error
    return file


def with_kept(profile: HardwareProfile, folder: Path) -> HardwareProfile:
    """Return a profile of this machine with its unknown figures filled by what was measured.

    Known figures stay: they are peaks, and a measurement is what one program achieved of them.

    Raises:
        InputError: The file of measurements is damaged.
    """
    file = folder / _FILE
    entry = _read(file).get(profile.name)
    if entry is None:
        return profile
    try:
        filled = {
            name: Figure(value=value, grade="measured", source=entry["source"])
            for name, value in entry["figures"].items()
            if profile.figure(name) is None
        }
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise _damaged(file) from error
    return profile.model_copy(update={"figures": profile.figures.model_copy(update=filled)})


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(file) from error
    if not isinstance(content, dict):
        raise _damaged(file)
    return content


def _damaged(file: Path) -> InputError:
    return InputError(
        f"{file} does not hold what `advisor profile --measure` wrote. Delete it and measure again."
    )
