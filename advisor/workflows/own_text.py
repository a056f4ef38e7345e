"""The text that a model writes itself, as commands use it: written once, kept beside the plan."""

from __future__ import annotations

import io
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock

from advisor.calibration.corpora import OWN_TEXT
from advisor.calibration.drafts import Draft
from advisor.calibration.own_text import as_sequences, own_text_key, write, written_by
from advisor.errors import InputError
from advisor.plan.files import write_atomically
from advisor.plan.folders import cache_root
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

_SUFFIX = ".self.npy"
_TOKEN_BYTES = 16
"""Of a token on the disk: in the text itself, and as digits in a draft."""


@dataclass(frozen=True, slots=True)
class OwnText:
    """Gives a model's own text: as it lies beside a plan, or in the cache, or written now.

    Attributes:
        loaded: The unquantized model.
        progress: Called with events while it writes.
        plan_path: The plan that the text was written for, if there is one.
        most_bytes: That writing may add to the disk; None for what is free.
    """

    loaded: LoadedModel
    progress: ProgressCallback = ignore_progress
    plan_path: Path | None = None
    most_bytes: int | None = None

    def __call__(self, sequences: int, sequence_length: int, seed: int) -> TokenSequences:
        """Return so many sequences; the same ones as long as they are kept."""
        shape = (sequences, sequence_length)
        if self.plan_path is not None:
            found = load_tokens(own_text_path(self.plan_path), shape)
            if found is not None:
                return as_sequences(found, seed)
        key = own_text_key(self.loaded, sequences, sequence_length, seed)
        kept = cache_root() / "texts" / f"{key}.npy"
        tokens = load_tokens(kept, shape)
        if tokens is None:
            with _alone(kept):
                tokens = load_tokens(kept, shape)  # another process may have written it meanwhile
                if tokens is None:
                    tokens = self._written(kept, shape, seed)
        return as_sequences(tokens, seed)

    def _written(self, kept: Path, shape: tuple[int, int], seed: int) -> Tensor:
        """Let the model write, or write on what a stopped run left; keep it."""
        left = self.most_bytes
        if left is not None:
            left -= _TOKEN_BYTES * shape[0] * shape[1]
        draft = Draft(kept.with_suffix(".draft"), written_by(self.loaded), left)
        tokens = write(
            self.loaded, sequences=shape[0], sequence_length=shape[1], seed=seed,
            progress=stage(self.progress, "Writing text"), draft=draft,
        )  # fmt: skip
        save_tokens(kept, tokens)
        draft.delete()
        return tokens


@contextmanager
def _alone(kept: Path) -> Iterator[None]:
    """Wait until no other process writes the same text.

    Raises:
        InputError: The folder cannot be written.
    """
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(kept.with_suffix(".lock"))
        held.acquire()
    except OSError as error:
        raise InputError(
            f"cannot write text to {kept.parent}: {error.strerror}. "
            "Set ADVISOR_CACHE to a folder that can be written."
        ) from error
    try:
        yield
    finally:
        held.release()


def own_text_path(plan_path: Path) -> Path:
    """Return where a plan's own text lies: beside it."""
    return plan_path.with_name(plan_path.name + _SUFFIX)


def keep_own_text(drawn: TokenSequences | None, plan_path: Path) -> None:
    """Write what a model wrote of some sequences beside a plan; nothing where it wrote none."""
    if drawn is not None and OWN_TEXT in drawn.sources:
        save_tokens(own_text_path(plan_path), drawn.of_source(OWN_TEXT).tokens)


def save_tokens(path: Path, tokens: Tensor) -> None:
    """Write tokens as a NumPy file of int32 [sequences, sequence_length].

    Raises:
        InputError: The folder cannot be written.
    """
    content = io.BytesIO()
    np.save(content, tokens.numpy().astype("<i4"), allow_pickle=False)
    write_atomically(path, content.getvalue())


def load_tokens(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """Return what :func:`save_tokens` wrote, int64; None where no such file is whole."""
    try:
        with path.open("rb") as handle:
            found = np.load(handle, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.shape != shape or found.dtype != np.dtype("<i4"):
        return None
    return torch.from_numpy(found.astype(np.int64))
