"""The statistics store: content-addressed, checksummed, atomic and resumable, on disk."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from advisor.calibration.moments import unpack_moment
from advisor.calibration.statistics import LayerStatistics
from advisor.errors import AdvisorError, InputError
from advisor.plan.hashing import sha256_file, sha256_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from advisor.modelspec import LinearSpec

STORE_VERSION = 3
"""Raised whenever stored sums would differ for the same key."""
_MANIFEST = "manifest.json"


def cache_root() -> Path:
    """Return the folder of everything that can be computed again: $ADVISOR_CACHE or ~/.cache."""
    chosen = os.environ.get("ADVISOR_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "advisor"


def statistics_key(weights_sha256: str, tokens_sha256: str, settings: Mapping[str, Any]) -> str:
    """Return the name under which statistics of these weights and tokens are kept.

    Args:
        weights_sha256: Hash of the model (``LoadedModel.fingerprint``).
        tokens_sha256: Hash of the token sequences.
        settings: Everything else that changes the sums; JSON values.
    """
    return sha256_json([STORE_VERSION, weights_sha256, tokens_sha256, dict(settings)])[:32]


class StatisticsStore:
    """Statistics of every linear of a model over one set of token sequences.

    A folder ``<root>/statistics/<key>`` holds one safetensors file per block for the inputs (one
    delta of sums for each sample prefix) and one for what a backward pass gives (output gradients,
    and the inputs' second moments, which they weigh; without one, these lie with the inputs), and a
    manifest with
    their checksums. Files are written under another name, synced and renamed, then recorded, so a
    killed run leaves only whole files; a file is verified once, when it is first read.
    """

    def __init__(self, root: Path, key: str) -> None:
        """Open or prepare a store; nothing is written yet.

        Args:
            root: Folder of the cache (see :func:`cache_root`).
            key: See :func:`statistics_key`.
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
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of samples for which statistics can be read."""
        return tuple(self.manifest.get("prefixes", ()))

    @property
    def size_bytes(self) -> int:
        """Bytes of the finished files."""
        return sum(entry["bytes"] for entry in self.manifest.get("files", {}).values())

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
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        entry = {"sha256": sha256_file(temporary), "bytes": temporary.stat().st_size}
        temporary.replace(path)
        self._verified.add(name)
        self._save_manifest({**self.manifest, "files": {**self.manifest["files"], name: entry}})

    def finish(self) -> None:
        """Mark the store as complete and drop what was only needed on the way."""
        self._save_manifest({**self.manifest, "complete": True})
        shutil.rmtree(self.work_folder, ignore_errors=True)

    def layer(
        self, linear: LinearSpec, samples: int | None = None, *, gradients: bool = True
    ) -> LayerStatistics:
        """Return a linear's statistics.

        Args:
            linear: Which one.
            samples: Use only the first samples; one of :attr:`prefixes`, None for all. Gradients
                are always those of all samples: they serve scores, never codes.
            gradients: False leaves them out, which saves reading them.

        Raises:
            InputError: The store is not complete, or was not asked to keep that prefix.
            AdvisorError: A file is missing or damaged.
        """
        if not self.complete:
            raise InputError(f"statistics in {self.folder} are not complete: collect them first.")
        count = self._prefix_count(samples)
        path = self.verified(inputs_file(linear.block))
        group = linear.input_group
        with safe_open(str(path), framework="pt") as handle:
            maximum, total = (handle.get_tensor(f"0/{group}/{kind}") for kind in ("maximum", "sum"))
            for index in range(1, count):
                maximum = maximum.maximum(handle.get_tensor(f"{index}/{group}/maximum"))
                total += handle.get_tensor(f"{index}/{group}/sum")
        moment, weight = self._moment(linear, count)
        gradient = self._gradient(linear) if gradients else None
        return LayerStatistics(
            tokens=self.tokens(linear, samples),
            second_moment=moment,
            absolute_maximum=maximum,
            absolute_sum=total,
            gradient_tokens=0 if gradient is None else self.manifest["gradient_tokens"],
            gradient_moment=gradient,
            moment_weight=weight,
        )

    def weights(self, linear: LinearSpec) -> Tensor | None:
        """Return how much each token counts in a linear's second moment, float32 [tokens].

        None where all count alike. Of an expert of a mixture, the tokens routed to it.
        """
        if not self.manifest["gradient_tokens"]:
            return None
        path = self.verified(gradients_file(linear.block))
        with safe_open(str(path), framework="pt") as handle:
            found: Tensor = handle.get_tensor(f"{linear.input_group}/weights")
        return found

    def _moment(self, linear: LinearSpec, count: int) -> tuple[Tensor, float | None]:
        """Return a linear's second moment over some prefixes, and the sum of its weights."""
        weighted = bool(self.manifest["gradient_tokens"])
        name = gradients_file(linear.block) if weighted else inputs_file(linear.block)
        group, weight = linear.input_group, 0.0
        with safe_open(str(self.verified(name)), framework="pt") as handle:
            moment: Tensor = handle.get_tensor(f"0/{group}/moment")
            for index in range(1, count):
                moment += handle.get_tensor(f"{index}/{group}/moment")
            if weighted:
                weights = [handle.get_tensor(f"{index}/{group}/weight") for index in range(count)]
                weight = float(sum(weights))
        return unpack_moment(moment, linear.in_features), weight if weighted else None

    def with_gradient(self, statistics: LayerStatistics, linear: LinearSpec) -> LayerStatistics:
        """Return statistics with a linear's own gradients, of another that reads the same input.

        Args:
            statistics: Of a linear of the same input group; its sums are shared, not copied.
            linear: Which one's gradients.
        """
        gradient = self._gradient(linear)
        tokens = 0 if gradient is None else self.manifest["gradient_tokens"]
        return replace(statistics, gradient_tokens=tokens, gradient_moment=gradient)

    def tokens(self, linear: LinearSpec, samples: int | None = None) -> int:
        """Return how many input rows were summed: of an expert, the tokens routed to it."""
        count = self._prefix_count(samples)
        if not linear.is_expert:
            return int(self.manifest["tokens"][count - 1])
        path = self.verified(inputs_file(linear.block))
        with safe_open(str(path), framework="pt") as handle:
            names = [f"{index}/{linear.input_group}/tokens" for index in range(count)]
            return sum(int(handle.get_tensor(name)) for name in names)

    def _prefix_count(self, samples: int | None) -> int:
        """Return how many deltas make up a prefix."""
        prefixes = self.prefixes
        if samples is None:
            return len(prefixes)
        if samples not in prefixes:
            raise InputError(
                f"statistics were kept for {', '.join(map(str, prefixes))} samples, but not for "
                f"{samples}. Use one of these, or collect with that prefix."
            )
        return prefixes.index(samples) + 1

    def _gradient(self, linear: LinearSpec) -> Tensor | None:
        """Return a linear's gradient moment, full or diagonal, or None."""
        if not self.manifest["gradient_tokens"]:
            return None
        path = self.verified(gradients_file(linear.block))
        with safe_open(str(path), framework="pt") as handle:
            values: Tensor = handle.get_tensor(linear.name)
        if values.shape[0] == linear.out_features:
            return values
        return unpack_moment(values, linear.out_features)

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


def inputs_file(block: int) -> str:
    """Return the name of the file with a block's input statistics."""
    return f"inputs-{block:05d}.safetensors"


def gradients_file(block: int) -> str:
    """Return the name of the file with a block's gradient statistics."""
    return f"gradients-{block:05d}.safetensors"
