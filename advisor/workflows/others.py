"""``backends``: list, install and check other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from advisor.backends.environments import check, install, installed_version
from advisor.backends.registry import BACKENDS, get_backend
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage


def list_backends() -> dict[str, Any]:
    """Return every backend: what it makes, what it needs, whether it is installed."""
    rows = [
        {
            "name": backend.name,
            "makes": list(backend.methods),
            "needs": backend.needs,
            "version": installed_version(backend),
        }
        for backend in BACKENDS.values()
    ]
    return {"schema_version": 1, "backends": rows}


def install_backend(
    name: str,
    *,
    python: str | None = None,
    wheels: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Create a backend's environment.

    Args:
        name: The backend.
        python: Interpreter of the environment; this one's by default.
        wheels: Folder to install from, without an index.
        progress: Called with events.

    Raises:
        InputError: Unknown backend, interpreter or folder.
        BackendError: The installation failed; the message names the log.
    """
    backend = get_backend(name)
    step = stage(progress or ignore_progress, f"Installing {name}")
    folder = None if wheels is None else Path(wheels)
    return install(backend, step, python=python, wheels=folder).to_dict()


def check_backend(name: str) -> dict[str, Any]:
    """Say whether a backend imports, and could quantize on this machine.

    Raises:
        InputError: Unknown backend.
    """
    return check(get_backend(name)).to_dict()
