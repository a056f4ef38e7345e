"""A text that a model is still writing, in a folder: a stopped run's is gone on with.

To go on as if nothing had happened takes the same keys and values of all tokens, to the last bit:
computed for whole sequences at once they differ from those computed token by token. So they are
kept, in files that memory maps. A run that is killed leaves in them what it wrote; what a machine
that lost power lost of them is found out by checksums, and the text is then begun anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from typing import TYPE_CHECKING, Any

import torch

from advisor.calibration.decoding import filled_slots
from advisor.calibration.passes import free_bytes
from advisor.errors import InputError
from advisor.models.allocator import drop_pages
from advisor.plan.files import write_atomically
from advisor.predict.explain import size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

SAVE_SECONDS = 20.0
"""How much work a kill may cost."""
_STATE = "draft.json"


class Draft:
    """What is written so far of one text.

    Attributes:
        rows: Sequences that are written at once; None where nothing is written.
        begun: Tokens of the sequences that were begun, int64 [rows, tokens], if any were.
        filled: How many tokens of theirs have keys and values in the files.
    """

    def __init__(
        self, folder: Path, written_by: Mapping[str, Any], most_bytes: int | None = None
    ) -> None:
        """Take up what lies in a folder, if the same machine and versions wrote it; else empty it.

        Args:
            folder: Of this text alone; no other process may write to it.
            written_by: What decides the last bits of what is computed.
            most_bytes: That its files may add to the disk; None for what is free.

        Raises:
            InputError: The folder cannot be written.
        """
        self.folder = folder
        self.rows: int | None = None
        self.begun: Tensor | None = None
        self.filled = 0
        self._written_by = dict(written_by)
        self._most_bytes = most_bytes
        self._finished: list[list[int]] = []
        self._rooms: dict[str, tuple[Tensor, Tensor]] = {}
        self._checksums: list[tuple[int, str]] = []
        self._saved_s = time.monotonic()
        state = self._read()
        if state is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            self._take_up(state)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write text to {folder}: {error.strerror}. "
                "Set ADVISOR_CACHE to a folder that can be written."
            ) from error

    @property
    def due(self) -> bool:
        """Whether so much was written since the last time that it should be saved."""
        return time.monotonic() - self._saved_s >= SAVE_SECONDS

    def finished(self) -> list[Tensor]:
        """Return the sequences that are whole, int64 [sequences, length], as a list of at most one.

        So a list that more are added to can begin with it.
        """
        return [torch.tensor(self._finished)] if self._finished else []

    def most_rows(self, bytes_each: int) -> int:
        """Return how many sequences may be written at once, by the disk.

        Args:
            bytes_each: What the keys and values of one take.

        Raises:
            InputError: There is no room for one.
        """
        needs = f"the keys and values of one sequence of text need {size(bytes_each)} on the disk"
        if self._most_bytes is not None and bytes_each > self._most_bytes:
            raise InputError(
                f"{needs} while the model writes it; --max-disk allows {size(self._most_bytes)}. "
                "Use a shorter --sequence-length, or --calibration with text that is there."
            )
        free = free_bytes(self.folder)
        if bytes_each > free:
            raise InputError(
                f"{needs} while the model writes it, but {size(free)} are free in {self.folder}. "
                "Free some, or set ADVISOR_CACHE to a folder on another."
            )
        return min(free, free if self._most_bytes is None else self._most_bytes) // bytes_each

    def room(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return room for keys or values: on the host a file's, which has what a stopped run left.

        Raises:
            InputError: The disk is full.
        """
        file = self._map(name, shape, like.dtype)
        room = file if like.device.type == "cpu" else file.to(like.device)
        self._rooms[name] = (room, file)
        return room

    def save(self, begun: Tensor, filled: int, rows: int) -> None:
        """Keep what is written of the sequences that were begun.

        Args:
            begun: All their tokens, int64 [rows, tokens].
            filled: How many of them have gone through the model.
            rows: How many sequences are written at once.

        Raises:
            InputError: The folder cannot be written.
        """
        before = self._checksums[-1][0] if self._checksums else 0
        for room, file in self._rooms.values():
            if room is not file:
                pairs = zip(filled_slots(room, before, filled), filled_slots(file, before, filled),
                            strict=True)  # fmt: skip
                for slots, kept in pairs:
                    kept.copy_(slots)
        files = {name: file for name, (_, file) in self._rooms.items()}
        self._checksums.append((filled, _checksum(files, before, filled)))
        self._write(rows, begun.tolist())

    def finish(self, tokens: Tensor, rows: int) -> None:
        """Keep sequences that are whole; their keys and values are needed no more.

        Raises:
            InputError: The folder cannot be written.
        """
        self._finished += tokens.tolist()
        self.begun, self.filled = None, 0
        self._rooms, self._checksums = {}, []
        self._write(rows, [])
        self._drop_rooms()

    def delete(self) -> None:
        """Remove the folder."""
        self._rooms = {}
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, rows: int, begun: list[list[int]]) -> None:
        rooms = {
            name: [list(file.shape), str(file.dtype).removeprefix("torch.")]
            for name, (_, file) in self._rooms.items()
        }
        state = {
            "written_by": self._written_by, "rows": rows, "finished": self._finished,
            "begun": begun, "rooms": rooms, "checksums": self._checksums,
        }  # fmt: skip
        write_atomically(self.folder / _STATE, json.dumps(state))
        self._saved_s = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        """Return what a run left that this one can go on with."""
        try:
            state = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(state, dict) or state.get("written_by") != self._written_by:
            return None
        files = {}
        for name, (shape, dtype) in state["rooms"].items():
            kind = getattr(torch, dtype)
            size = torch.Size(shape).numel() * kind.itemsize
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != size:
                return None
            files[name] = self._map(name, tuple(shape), kind)
        before = 0
        for stop, expected in state["checksums"]:
            if _checksum(files, before, stop) != expected:
                return None
            before = stop
        found: dict[str, Any] = state
        return found

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.rows = int(state["rows"])
        self._finished = state["finished"]
        if state["begun"]:
            self.begun = torch.tensor(state["begun"])
            self._checksums = [(stop, found) for stop, found in state["checksums"]]
            self.filled = self._checksums[-1][0]
        else:  # the run ended before it removed them
            self._drop_rooms()

    def _drop_rooms(self) -> None:
        for path in self.folder.glob("[0-9]*"):
            path.unlink()

    def _map(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a file as a tensor; a new one has its room on the disk at once."""
        path = self.folder / name
        size = torch.Size(shape).numel()
        if hasattr(os, "posix_fallocate"):  # else a full disk would end the process later
            try:
                with path.open("ab") as handle:
                    os.posix_fallocate(handle.fileno(), 0, size * dtype.itemsize)
            except OSError as error:
                raise InputError(
                    f"the keys and values of a text in {self.folder} need room on the disk, but "
                    f"{error.strerror}. Free some, or set ADVISOR_CACHE to a folder on another."
                ) from error
        flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        return flat.view(shape)


def _checksum(files: Mapping[str, Tensor], start: int, stop: int) -> str:
    """Return the sha256 of the keys and values of some tokens."""
    digest = hashlib.sha256()
    for name in sorted(files):
        for slots in filled_slots(files[name], start, stop):
            digest.update(slots.contiguous().view(torch.uint8).numpy().data)
        drop_pages(files[name])
    return digest.hexdigest()
