"""What the unquantized model says about a text: kept on disk, reused by every measurement.

Computing it holds what :mod:`advisor.evaluation.logits` holds; the log-probabilities go to a file
a few tokens at a time, and are read so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from advisor.errors import AdvisorError, InputError
from advisor.evaluation.logits import iterate_log_probabilities
from advisor.models.inspect import embedded_tokens
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel

Progress = Callable[[int, int], None]
REFERENCE_VERSION = 1
_FACTS = "reference.json"
_VALUES = "log_probabilities.f16"
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Reference:
    """The unquantized model's predictions of every next token of some sequences.

    Attributes:
        sequences: The evaluation sequences.
        nll: float64 [sequences], mean negative log-likelihood of the text's own tokens, nats.
        folder: Where the log-probabilities are.
        vocabulary: Number of tokens that are told apart.
        checksums: sha256 of each sequence's stored log-probabilities.
    """

    sequences: TokenSequences
    nll: NDArray[np.float64]
    folder: Path
    vocabulary: int
    checksums: tuple[str, ...]

    @property
    def perplexity(self) -> float:
        """Perplexity of the unquantized model."""
        return float(np.exp(self.nll.mean()))

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.nll)

    def first(self, count: int) -> Reference:
        """Return the reference of the first sequences alone."""
        return replace(
            self,
            sequences=self.sequences.first(count),
            nll=self.nll[:count],
            checksums=self.checksums[:count],
        )

    def log_probabilities(self, index: int) -> Tensor:
        """Return a sequence's log-probabilities, float16 [length - 1, vocabulary].

        Rows must be normalised again after conversion to float32: then rounding to float16
        changes KL only in second order (about 1e-7 nats).

        Raises:
            AdvisorError: The stored values are damaged.
        """
        self.check(index)
        return self.rows(index, 0, self.sequences.sequence_length - 1)

    def check(self, index: int) -> None:
        """Check that a sequence's log-probabilities are what was stored, a few at a time.

        Raises:
            AdvisorError: They are damaged.
        """
        size = (self.sequences.sequence_length - 1) * self.vocabulary * 2
        digest = hashlib.sha256()
        try:
            with (self.folder / _VALUES).open("rb") as handle:
                handle.seek(index * size)
                for start in range(0, size, _READ_BYTES):
                    digest.update(handle.read(min(_READ_BYTES, size - start)))
        except OSError as error:
            raise self._damaged(self.folder / _VALUES) from error
        if digest.hexdigest() != self.checksums[index]:
            raise self._damaged(self.folder / _VALUES)

    def rows(self, index: int, start: int, count: int) -> Tensor:
        """Return a sequence's log-probabilities of some tokens, float16 [count, vocabulary].

        What is stored is not checked here, see :meth:`check`.
        """
        first = index * (self.sequences.sequence_length - 1) + start
        values = np.fromfile(
            self.folder / _VALUES, np.float16, count * self.vocabulary,
            offset=first * self.vocabulary * 2,
        )  # fmt: skip
        return torch.from_numpy(values.reshape(count, self.vocabulary))

    def _damaged(self, path: Path) -> AdvisorError:
        return AdvisorError(
            f"reference log-probabilities {path} are damaged. Delete the folder {self.folder} and "
            "run again; they are computed anew."
        )

    @staticmethod
    def exists(loaded: LoadedModel, sequences: TokenSequences, folder: Path) -> bool:
        """Whether :meth:`compute` would find the reference on disk."""
        return (_place(loaded, sequences, folder) / _FACTS).is_file()

    @classmethod
    def compute(
        cls,
        loaded: LoadedModel,
        sequences: TokenSequences,
        folder: Path,
        progress: Progress | None = None,
    ) -> Reference:
        """Return the reference of a model, from disk where it was computed before.

        Args:
            loaded: The unquantized model; its data type is part of what identifies the result.
            sequences: Evaluation sequences.
            folder: Folder of the cache; a content-addressed folder is made inside.
            progress: Called with (sequences done, sequences in all).

        Raises:
            InputError: Not enough disk, the folder cannot be written, or tokens that the model does
                not know.
        """
        sequences.check_vocabulary(embedded_tokens(loaded.model))
        target = _place(loaded, sequences, folder)
        if not (target / _FACTS).is_file():
            _write(loaded, sequences, target, progress)
        facts = json.loads((target / _FACTS).read_text(encoding="utf-8"))
        return cls(
            sequences=sequences,
            nll=np.array(facts["nll"], dtype=np.float64),
            folder=target,
            vocabulary=facts["vocabulary"],
            checksums=tuple(facts["checksums"]),
        )


def _place(loaded: LoadedModel, sequences: TokenSequences, folder: Path) -> Path:
    """Return the content-addressed folder of a reference."""
    key = sha256_json([REFERENCE_VERSION, loaded.fingerprint, sequences.sha256, str(loaded.dtype)])
    return Path(folder) / "references" / key[:32]


def reference_bytes(sequences: TokenSequences, vocabulary: int) -> int:
    """Return the bytes that a reference takes on disk."""
    return sequences.sequences * (sequences.sequence_length - 1) * vocabulary * 2


def _write(
    loaded: LoadedModel, sequences: TokenSequences, target: Path, progress: Progress | None
) -> None:
    """Compute a reference beside its place and move it there when it is whole."""
    config: Any = loaded.model.config
    vocabulary = int(config.vocab_size)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot write the reference to {target.parent}: {error.strerror}. "
            "Set ADVISOR_CACHE to a folder that can be written."
        ) from error
    try:
        needed = reference_bytes(sequences, vocabulary)
        free = shutil.disk_usage(temporary).free
        if needed > free:
            raise InputError(
                f"the reference needs {needed / 1e9:.2f} GB under {target.parent}, but "
                f"{free / 1e9:.2f} GB are free. Use fewer evaluation sequences, or set "
                "ADVISOR_CACHE to a folder on another disk."
            )
        facts = _fill(loaded, sequences, temporary / _VALUES, vocabulary, progress)
        (temporary / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
        if target.exists():  # another process was faster, or a former one was killed
            shutil.rmtree(target)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fill(
    loaded: LoadedModel,
    sequences: TokenSequences,
    path: Path,
    vocabulary: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the log-probabilities of every sequence and return what is remembered of them."""
    losses = [0.0] * sequences.sequences
    digests = [hashlib.sha256() for _ in losses]
    texts = list(sequences.tokens)
    with path.open("wb") as handle:
        for index, start, computed in iterate_log_probabilities(loaded.model, texts, progress):
            labels = texts[index][start + 1 : start + 1 + len(computed)].to(computed.device)
            losses[index] -= float(computed.gather(1, labels[:, None]).sum(dtype=torch.float64))
            # float16 ends at -65504; no log-probability of a finite model comes near it.
            stored = computed.clamp_min(-60000.0).to(torch.float16).cpu().numpy().data
            digests[index].update(stored)
            handle.write(stored)
        handle.flush()
        os.fsync(handle.fileno())
    losses = [loss / (sequences.sequence_length - 1) for loss in losses]
    checksums = [digest.hexdigest() for digest in digests]
    return {"nll": losses, "checksums": checksums, "vocabulary": vocabulary}
