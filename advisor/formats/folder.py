"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from advisor.errors import InputError
from advisor.predict.explain import size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NO_SPACE = ("os error 28", "No space left")


@contextlib.contextmanager
def atomic_folder(output: Path, *, needed_bytes: int = 0, computes: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside the output, renamed to it at the end.

    Whatever goes wrong, nothing of it stays behind, and the output is as it was. An output that is
    itself such a folder is one that more will be written to: messages name what it will be.

    Args:
        output: The folder to make; it may exist if it is empty.
        needed_bytes: What will be written, to say beforehand that the disk is too small.
        computes: Whether more is done than to write there: what fails then is not the output's.

    Raises:
        InputError: The output exists and is not empty, cannot be written to, or the disk is full.
    """
    check_output(output)
    output = output.absolute()
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _check_space(output, needed_bytes)
        partial.mkdir()
        yield partial
        _sync_folder(partial)
        if output.is_dir():
            output.rmdir()
        partial.rename(output)
        _sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        if computes:
            raise
        raise _translated(error, output) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_output(output: Path) -> None:
    """Refuse an output that is in use or cannot be made, before any work.

    Raises:
        InputError: It exists and is not an empty folder, or its place is not writable.
    """
    output = output.absolute()
    advice = "Choose another folder, or remove it first."
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"the output must be a folder, but {output} is a file. {advice}")
    if output.is_dir() and any(output.iterdir()):
        raise InputError(
            f"the output folder must not exist or be empty, but {output} is not. {advice}"
        )
    parent = output.parent
    while not parent.exists():
        parent = parent.parent
    if not can_write(parent):
        raise InputError(
            f"cannot write {output}: {parent} is not a folder that you may write to. "
            "Choose another folder."
        )


def can_write(folder: Path) -> bool:
    """Whether files can be made in a folder; tried, as rights alone do not tell (``/proc``)."""
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return False
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _check_space(output: Path, needed_bytes: int) -> None:
    """Refuse a disk that is too small, before any work.

    Raises:
        InputError: There is not enough room.
    """
    free = shutil.disk_usage(output.parent).free
    if needed_bytes > free:
        raise InputError(
            f"the checkpoint needs {size(needed_bytes)}, but the disk of {output.parent} has "
            f"{size(free)} left. Free some, or choose another folder."
        )


def _translated(error: Exception, output: Path) -> Exception:
    """Return the error that a user can act on, or the error itself."""
    output = _as_named(output)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(text in str(error) for text in _NO_SPACE):
        return InputError(
            f"the disk of {output.parent} is full; nothing was written to {output}. "
            "Free some room, or choose another folder."
        )
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        return InputError(
            f"cannot write {output}: {reason}. Choose a folder that you may write to."
        )
    return error


def _as_named(output: Path) -> Path:
    """Return what a temporary folder will be called; another one is as it is."""
    match = re.fullmatch(r"\.(.+)\.partial-\d+", output.name)
    return output.with_name(match[1]) if match else output


def write_text(path: Path, text: str) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


def sync_file(path: Path) -> str:
    """Wait until a file is on the disk, and return the sha256 of what it holds."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
        os.fsync(handle.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Wait until a folder's entries are on the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
