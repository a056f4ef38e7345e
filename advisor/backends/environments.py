"""An environment of its own for each backend: their requirements conflict with each other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import BackendError
from advisor.plan.hashing import sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from advisor.backends.registry import Backend

_PROBE = """
import importlib, importlib.metadata, json, sys
found = {"version": None, "problem": "", "cuda": False}
try:
    found["version"] = importlib.metadata.version(sys.argv[1])
    importlib.import_module(sys.argv[2])
    import torch
    found["cuda"] = torch.cuda.is_available()
except Exception as error:
    found["problem"] = f"{type(error).__name__}: {error}".splitlines()[0]
print(json.dumps(found))
"""
_PROBE_SECONDS = 300


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """State of one backend's environment.

    Attributes:
        name: The backend.
        folder: Its environment.
        version: Installed version, None where there is no environment.
        works: Whether it imports and could quantize on this machine.
        problem: Why not, or an empty string.
        requirements_sha256: Hash of the pinned requirements, for plans.
    """

    name: str
    folder: Path
    version: str | None
    works: bool
    problem: str
    requirements_sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor backends check --json``."""
        return {
            "schema_version": 1,
            "name": self.name,
            "folder": str(self.folder),
            "version": self.version,
            "works": self.works,
            "problem": self.problem,
            "requirements_sha256": self.requirements_sha256,
        }


def environments_root() -> Path:
    """Return where environments live: $ADVISOR_BACKENDS, or a folder of the user's data."""
    chosen = os.environ.get("ADVISOR_BACKENDS")
    return Path(chosen) if chosen else Path.home() / ".local" / "share" / "advisor" / "backends"


def environment_of(backend: Backend) -> Path:
    """Return a backend's folder; other requirements make another environment."""
    return environments_root() / f"{backend.name}-{sha256_file(backend.requirements)[:12]}"


def python_of(folder: Path) -> Path:
    """Return an environment's interpreter."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def installed_version(backend: Backend) -> str | None:
    """Return the version that was installed, without running anything."""
    marker = environment_of(backend) / "advisor-backend.json"
    if not marker.is_file():
        return None
    return str(json.loads(marker.read_text(encoding="utf-8"))["version"])


def install(backend: Backend, progress: Callable[[int, int], None] | None = None) -> BackendStatus:
    """Create a backend's environment from its pinned requirements.

    An environment that was begun and not finished is made anew.

    Raises:
        BackendError: A step failed; the message names its log.
    """
    folder = environment_of(backend)
    if installed_version(backend) is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "install.log"
        steps = _steps(backend, folder)
        for done, command in enumerate(steps):
            if progress is not None:
                progress(done, len(steps))
            with log.open("ab") as handle:
                result = subprocess.run(
                    command, stdout=handle, stderr=subprocess.STDOUT, check=False
                )
            if result.returncode != 0:
                raise BackendError(
                    f"installing {backend.name} failed (exit {result.returncode}); "
                    f"its log is {log}. {_last_error(log)}"
                )
        if progress is not None:
            progress(len(steps), len(steps))
        version = _probe(backend, folder)["version"]
        marker = folder / "advisor-backend.json"
        marker.write_text(json.dumps({"name": backend.name, "version": version}), encoding="utf-8")
    return check(backend)


def check(backend: Backend) -> BackendStatus:
    """Say whether a backend imports, and could quantize on this machine."""
    folder = environment_of(backend)
    digest = sha256_file(backend.requirements)
    if installed_version(backend) is None:
        problem = f"not installed. Run: advisor backends install {backend.name}"
        return BackendStatus(backend.name, folder, None, False, problem, digest)
    found = _probe(backend, folder)
    problem = str(found["problem"])
    if not problem and backend.cuda_only and not found["cuda"]:
        problem = "it quantizes on CUDA devices only, and torch sees none here"
    return BackendStatus(backend.name, folder, found["version"], not problem, problem, digest)


def _steps(backend: Backend, folder: Path) -> list[list[str]]:
    python = str(python_of(folder))
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    torch = [
        line.strip()
        for line in backend.requirements.read_text(encoding="utf-8").splitlines()
        if line.startswith("torch==")
    ]
    steps = [[sys.executable, "-m", "venv", str(folder)]]
    if backend.no_isolation:
        steps.append([*pip, *torch, "setuptools", "wheel", "ninja", "packaging"])
        pip.append("--no-build-isolation")
    steps.append([*pip, "-r", str(backend.requirements)])
    return steps


def _probe(backend: Backend, folder: Path) -> dict[str, Any]:
    command = [str(python_of(folder)), "-c", _PROBE, backend.name, backend.module]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
        found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
        problem = f"its environment does not answer ({type(error).__name__}). Delete {folder}"
        return {"version": None, "problem": problem, "cuda": False}
    return found


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1].strip()
