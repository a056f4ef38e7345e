"""The text that a model writes itself, as commands use it: written once, kept beside the plan."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from advisor.calibration.corpora import OWN_TEXT
from advisor.calibration.own_text import as_sequences, own_text_key, write
from advisor.plan.files import write_atomically
from advisor.plan.folders import cache_root
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

_SUFFIX = ".self.npy"


@dataclass(frozen=True, slots=True)
class OwnText:
    """Gives a model's own text: as it lies beside a plan, or in the cache, or written now.

    Attributes:
        loaded: The unquantized model.
        progress: Called with events while it writes.
        plan_path: The plan that the text was written for, if there is one.
    """

    loaded: LoadedModel
    progress: ProgressCallback = ignore_progress
    plan_path: Path | None = None

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
            tokens = write(
                self.loaded, sequences=sequences, sequence_length=sequence_length, seed=seed,
                progress=stage(self.progress, "Writing text"),
            )  # fmt: skip
            save_tokens(kept, tokens)
        return as_sequences(tokens, seed)


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
