"""Where a shared study lies, who works on it, and whether they still do."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_UNCLAIMED_SECONDS = 60.0
_ELSEWHERE_SECONDS = 3600.0


def worker_name() -> str:
    """Return this process as a study remembers it: ``host:process``."""
    return f"{socket.gethostname()}:{os.getpid()}"


def is_alive(worker: str | None, age: float) -> bool:
    """Return whether a trial's process may still be at work."""
    if worker is None:
        return age < _UNCLAIMED_SECONDS
    host, _, process = worker.rpartition(":")
    if host != socket.gethostname():
        return age < _ELSEWHERE_SECONDS
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def storage_url(storage: str | Path | None, workdir: Path) -> str:
    """Return the URL of the study's database; a path or nothing means an SQLite file."""
    if storage is None:
        storage = workdir / "study.db"
    text = str(storage)
    if "://" in text:
        return text
    Path(text).expanduser().resolve().parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{Path(text).expanduser().resolve()}"
