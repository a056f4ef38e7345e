"""An environment of its own for each backend: their requirements conflict with each other's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.errors import BackendError, InputError
from advisor.plan.folders import environments_root
from advisor.plan.hashing import sha256_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
_PROBE_SECONDS = 900
TORCH_LINE = "#: "
"""Begins the line of a lock file that names torch: pip takes it for a comment."""


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


def install(
    backend: Backend,
    progress: Callable[[int, int], None] | None = None,
    *,
    python: str | None = None,
    wheels: Path | None = None,
) -> BackendStatus:
    """Create a backend's environment from its lock file.

    Every package is pinned and checked against its hash, but for torch and what only torch needs:
    its builds differ by platform. An environment that was begun and not finished is made anew.

    Args:
        backend: The backend.
        progress: Called with (steps done, in all).
        python: Interpreter of the environment, a path or a name; this one's by default.
        wheels: Folder to install from, without an index.

    Raises:
        InputError: The interpreter does not exist or is of another version, or there is no folder.
        BackendError: A step failed; the message names its log.
    """
    folder = environment_of(backend)
    if installed_version(backend) is None:
        interpreter = _interpreter(backend, python)
        if wheels is not None and not wheels.is_dir():
            raise InputError(f"--wheels must be a folder with wheels, but {wheels} is none.")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / "install.log"
        steps = install_steps(backend, folder, interpreter, wheels)
        for done, command in enumerate(steps):
            if progress is not None:
                progress(done, len(steps))
            with log.open("ab") as handle:
                result = subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=handle,
                    stderr=subprocess.STDOUT,
                    cwd=folder,
                    check=False,
                )
            if result.returncode != 0:
                raise BackendError(
                    f"installing {backend.name} failed (exit {result.returncode}): "
                    f"{_last_error(log)} Its log: {log}"
                )
        if progress is not None:
            progress(len(steps), len(steps))
        version = locked_version(backend)
        marker = folder / "advisor-backend.json"
        marker.write_text(json.dumps({"name": backend.name, "version": version}), encoding="utf-8")
    return check(backend)


def _interpreter(backend: Backend, python: str | None) -> str:
    """Return the interpreter to use, if it is of a version that the lock file is for.

    Raises:
        InputError: There is none of that name, or it is of another version.
    """
    found = sys.executable if python is None else shutil.which(python)
    if found is None:
        raise InputError(f"--python must name an interpreter, but there is no {python!r}.")
    found = os.path.abspath(found)  # installed from another folder than this one
    command = [found, "-c", "import sys; print(*sys.version_info[:2])"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        version = tuple(int(part) for part in done.stdout.split())
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise InputError(f"--python {found} does not answer as Python ({error}).") from error
    oldest, newest = backend.pythons
    if not oldest <= version <= newest:
        words = [".".join(map(str, numbers)) for numbers in (oldest, newest, version)]
        raise InputError(
            f"{backend.name}'s lock file is for Python {words[0]} to {words[1]}, but {found} is "
            f"{words[2]}. Name another: advisor backends install {backend.name} "
            f"--python python{words[0]}"
        )
    return found


def locked_version(backend: Backend) -> str | None:
    """Return the version of the library that its lock file pins; None where it has none."""
    line = read_lock(backend.requirements)[1].get(backend.name, "")
    found = line.partition("==")[2].split()
    return found[0] if found else None


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


def install_steps(
    backend: Backend, folder: Path, interpreter: str, wheels: Path | None = None
) -> list[list[str]]:
    """Return the commands that make an environment, in order.

    torch follows what has hashes, so that its own dependencies are those already checked; a
    library that builds against torch comes last.

    Args:
        backend: The backend.
        folder: Where the environment goes; parts of the lock file are written into it.
        interpreter: Python to use.
        wheels: Folder to install from, without an index.
    """
    torch, locked = read_lock(backend.requirements)
    pip = [str(python_of(folder)), "-I", "-m", "pip", "install", "--disable-pip-version-check"]
    if wheels is not None:
        pip += ["--no-index", "--find-links", str(wheels.resolve())]
    hashed = [*pip, "--no-deps", "--require-hashes"]
    last = backend.name if backend.no_isolation else None
    first = {name: text for name, text in locked.items() if name != last}
    steps = [[interpreter, "-I", "-m", "venv", str(folder)]]
    if first:
        part = folder / "locked.txt"
        part.write_text("\n".join(first.values()) + "\n", encoding="utf-8")
        steps.append([*hashed, "-r", str(part)])
    if torch is not None:
        steps.append([*pip, torch])
    if last is not None:
        part = folder / "locked-last.txt"
        part.write_text(locked[last] + "\n", encoding="utf-8")
        steps.append([*hashed, "--no-build-isolation", "-r", str(part)])
    return steps


def read_lock(path: Path) -> tuple[str | None, dict[str, str]]:
    """Return a lock file's torch, and the lines of every other package by its lower-case name."""
    torch = None
    locked: dict[str, str] = {}
    current = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith(TORCH_LINE):
            torch = line.removeprefix(TORCH_LINE).strip()
        elif line.startswith("#") or not line.strip():
            continue
        elif line[0].isspace():
            locked[current] += f"\n{line}"
        else:
            current = line.partition("==")[0].strip().lower()
            locked[current] = line
    return torch, locked


def _probe(backend: Backend, folder: Path) -> dict[str, Any]:
    # Isolated: neither the folder that this runs in nor PYTHONPATH may stand in for a package.
    command = [str(python_of(folder)), "-I", "-c", _PROBE, backend.name, backend.module]
    try:
        with tempfile.TemporaryDirectory() as scratch:  # for what an import may write
            result = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_PROBE_SECONDS,
                cwd=scratch,
                check=False,
            )
        found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, ValueError, IndexError) as error:
        problem = f"its environment does not answer ({type(error).__name__}). Delete {folder}"
        return {"version": None, "problem": problem, "cuda": False}
    return found


def _last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().lstrip().startswith("error")]
    text = (errors or lines or [""])[0 if errors else -1].strip()
    return text if text.endswith(".") else f"{text}."
