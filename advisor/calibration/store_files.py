"""Files of a store: content-addressed, checksummed, atomic and resumable, with a manifest."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors.torch import save_file

from advisor.errors import AdvisorError, InputError
from advisor.plan.hashing import sha256_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

STORE_VERSION = 4
"""Raised whenever stored sums would differ for the same key."""
_MANIFEST = "manifest.json"


class StoreFiles:
    """A folder ``<root>/statistics/<key>`` of safetensors files and a manifest of checksums.

    Files are written under another name, synced and renamed, then recorded, so a killed run leaves
    only whole files; a file is verified once, when it is first read.
    """

    def __init__(self, root: Path, key: str) -> None:
        """Open or prepare a store; nothing is written yet.

        Args:
            root: Folder of the cache (see :func:`advisor.plan.folders.cache_root`).
            key: See :func:`advisor.calibration.store.statistics_key`.
        """
        self.root = Path(root)
        self.key = key
        self.folder = self.root / "statistics" / key
        self._manifest: dict[str, Any] | None = None
        self._verified: set[str] = set()

    @property
    def work_folder(self) -> Path:
        """Folder of what a run keeps only until it is done."""
        return self.folder / "work"

    @property
    def manifest(self) -> dict[str, Any]:
        """What the store holds; empty before the first write.

        Raises:
            AdvisorError: The manifest is damaged.
        """
        if self._manifest is None:
            path = self.folder / _MANIFEST
            if not path.is_file():
                return {}
            try:
                self._manifest = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise self._damaged(path) from error
        manifest: dict[str, Any] = self._manifest or {}
        return manifest

    @property
    def complete(self) -> bool:
        """Whether every statistic is there."""
        return bool(self.manifest.get("complete"))

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished files."""
        return sum(entry["bytes"] for entry in self.manifest.get("files", {}).values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of all that lies in its folder, what a killed run has left included."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Create the folder and its manifest, or go on with an interrupted run.

        Args:
            facts: ``prefixes``, ``tokens`` (rows of each prefix), ``gradient_tokens`` and
                ``settings``.

        Raises:
            InputError: The folder cannot be written.
        """
        if self.manifest:
            self._drop_leftovers()
            return
        try:
            self.work_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write statistics to {self.folder}: {error.strerror}. "
                "Set ADVISOR_CACHE to a folder that can be written."
            ) from error
        self._save_manifest({**facts, "version": STORE_VERSION, "files": {}, "complete": False})

    def _drop_leftovers(self) -> None:
        """Remove files that a killed run did not finish; who collects holds the lock."""
        for folder in (self.folder, self.work_folder):
            for path in folder.glob(".*"):
                path.unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Wait until no other process collects the same statistics; what it wrote is seen then.

        Raises:
            InputError: The folder cannot be written.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            held = FileLock(self.folder.with_name(f"{self.key}.lock"))
            held.acquire()
        except OSError as error:
            raise InputError(
                f"cannot write statistics to {self.folder}: {error.strerror}. "
                "Set ADVISOR_CACHE to a folder that can be written."
            ) from error
        try:
            self._manifest = None
            yield
        finally:
            held.release()

    def has(self, name: str) -> bool:
        """Whether a file was finished."""
        return name in self.manifest.get("files", {})

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file and record its checksum."""
        path = self.folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}")
        save_file(dict(tensors), str(temporary))
        with ThreadPoolExecutor(1) as beside, temporary.open("rb+") as handle:
            checksum = beside.submit(sha256_file, temporary)  # while the disk is waited for
            os.fsync(handle.fileno())
            entry = {"sha256": checksum.result(), "bytes": temporary.stat().st_size}
        temporary.replace(path)
        self._verified.add(name)
        self._save_manifest({**self.manifest, "files": {**self.manifest["files"], name: entry}})

    def finish(self) -> None:
        """Mark the store as complete and drop what was only needed on the way."""
        self._save_manifest({**self.manifest, "complete": True})
        shutil.rmtree(self.work_folder, ignore_errors=True)

    def verified(self, name: str) -> Path:
        """Return the path of a file whose checksum is right.

        Raises:
            AdvisorError: It is missing or damaged.
        """
        path = self.folder / name
        if name not in self._verified:
            entry = self.manifest["files"].get(name)
            if entry is None or not path.is_file() or sha256_file(path) != entry["sha256"]:
                raise self._damaged(path)
            self._verified.add(name)
        return path

    def _damaged(self, path: Path) -> AdvisorError:
        return AdvisorError(
            f"statistics file {path} is damaged or missing: its checksum is not the recorded one. "
            f"Delete the folder {self.folder} and run again; the statistics are collected anew."
        )

    def _save_manifest(self, manifest: dict[str, Any]) -> None:
        path = self.folder / _MANIFEST
        temporary = path.with_name(f".{_MANIFEST}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as handle:
            json.dump(manifest, handle, indent=1)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
        self._manifest = manifest
