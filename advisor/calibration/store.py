"""The statistics store: sums of every linear over one set of token sequences, on disk."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from advisor.calibration.moments import compacted, expanded, unpack_moment
from advisor.calibration.statistics import LayerStatistics
from advisor.calibration.store_files import STORE_VERSION, StoreFiles
from advisor.errors import InputError
from advisor.plan.hashing import sha256_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from advisor.modelspec import LinearSpec

_MOMENT, _ROOTS = "/moment", "_roots"


def statistics_key(weights_sha256: str, tokens_sha256: str, settings: Mapping[str, Any]) -> str:
    """Return the name under which statistics of these weights and tokens are kept.

    Args:
        weights_sha256: Hash of the model (``LoadedModel.fingerprint``).
        tokens_sha256: Hash of the token sequences.
        settings: Everything else that changes the sums; JSON values.

    The device and the number of threads that add them up are no part of it: they change the order
    of additions, and so the last bits. What was collected on one machine serves another.
    """
    return sha256_json([STORE_VERSION, weights_sha256, tokens_sha256, dict(settings)])[:32]


class StatisticsStore(StoreFiles):
    """Statistics of every linear of a model over one set of token sequences.

    One file per block holds the sums of its inputs (one delta for each sample prefix) and one what
    a backward pass gives: output gradients, and the inputs' second moments, which they weigh;
    without one, these lie with the inputs. How files are kept: :class:`StoreFiles`.

    Attributes:
        device: Where what is read goes.
        compact: Whether second moments of inputs are written in 16 bits.
    """

    def __init__(
        self, root: Path, key: str, device: torch.device | str = "cpu", *, compact: bool = False
    ) -> None:
        """Open or prepare a store; nothing is written yet.

        Args:
            root: Folder of the cache (see :func:`cache_root`).
            key: See :func:`statistics_key`.
            device: Where what is read goes; files do not depend on it.
            compact: See :class:`advisor.calibration.settings.CollectionSettings`.
        """
        super().__init__(root, key)
        self.device = torch.device(device)
        self.compact = compact

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one file of sums and record its checksum."""
        if not self.compact:
            super().put(name, tensors)
            return
        written: dict[str, Tensor] = {}
        for key, values in tensors.items():
            if key.endswith(_MOMENT):
                written[key], written[key + _ROOTS] = compacted(values)
            else:
                written[key] = values
        super().put(name, written)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Numbers of samples for which statistics can be read."""
        return tuple(self.manifest.get("prefixes", ()))

    @property
    def has_gradients(self) -> bool:
        """Whether a backward pass was part of it: without, embedding and head have no sums."""
        return bool(self.manifest.get("gradient_tokens"))

    def layer(
        self, linear: LinearSpec, samples: int | None = None, *, gradients: bool = True
    ) -> LayerStatistics:
        """Return a linear's statistics.

        Args:
            linear: Which one.
            samples: Use only the first samples; one of :attr:`prefixes`, None for all. Gradients
                are always those of all samples.
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
            absolute_maximum=maximum.to(self.device),
            absolute_sum=total.to(self.device),
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
            moment = self._packed(handle, f"0/{group}{_MOMENT}")
            for index in range(1, count):
                moment += self._packed(handle, f"{index}/{group}{_MOMENT}")
            if weighted:
                weights = [handle.get_tensor(f"{index}/{group}/weight") for index in range(count)]
                weight = float(sum(weights))
        return unpack_moment(moment, linear.in_features), weight if weighted else None

    def _packed(self, handle: Any, key: str) -> Tensor:
        """Return a packed moment of a file, float32."""
        values: Tensor = handle.get_tensor(key).to(self.device)
        if values.dtype != torch.int16:
            return values
        return expanded(values, handle.get_tensor(key + _ROOTS).to(self.device))

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
            values: Tensor = handle.get_tensor(linear.name).to(self.device)
        if values.shape[0] == linear.out_features:
            return values
        return unpack_moment(values, linear.out_features)


def inputs_file(block: int) -> str:
    """Return the name of the file with a block's input statistics."""
    return f"inputs-{block:05d}.safetensors"


def gradients_file(block: int) -> str:
    """Return the name of the file with a block's gradient statistics."""
    return f"gradients-{block:05d}.safetensors"
