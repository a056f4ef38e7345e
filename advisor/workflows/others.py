"""``backends``: list, install and check other libraries."""

from __future__ import annotations

from typing import Any

from advisor.backends.environments import check, install, installed_version
from advisor.backends.registry import BACKENDS, get_backend
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage


def list_backends() -> dict[str, Any]:
    """Return every backend: what it makes, what it needs, whether it is installed."""
    rows = [
        {
            "name": backend.name,
            "makes": list(backend.makes),
            "needs": backend.needs,
            "version": installed_version(backend),
        }
        for backend in BACKENDS.values()
    ]
    return {"schema_version": 1, "backends": rows}


def install_backend(name: str, *, progress: ProgressCallback | None = None) -> dict[str, Any]:
    """Create a backend's environment.

    Raises:
        InputError: Unknown backend.
        BackendError: The installation failed; the message names the log.
    """
    backend = get_backend(name)
    return install(backend, stage(progress or ignore_progress, f"Installing {name}")).to_dict()


def check_backend(name: str) -> dict[str, Any]:
    """Say whether a backend imports, and could quantize on this machine.

    Raises:
        InputError: Unknown backend.
    """
    return check(get_backend(name)).to_dict()
