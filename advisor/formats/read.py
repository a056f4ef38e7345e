"""Read a checkpoint back as the software that serves it will."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from advisor.errors import VerificationError, did_you_mean, join_errors
from advisor.formats.gguf_read import find_gguf, open_gguf
from advisor.formats.layouts import is_transposed
from advisor.formats.read_only import fused_experts
from advisor.formats.registry import get_format, readable_names
from advisor.formats.stored import open_stored, read_quantization
from advisor.models.checkpoint import weight_files
from advisor.models.config_file import read_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from advisor.formats.base import Stored
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme


_SHOWN = 10
"""Faults that an error lists; :attr:`Checkpoint.problems` has them all."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose modules were resolved and whose shapes were checked.

    Attributes:
        folder: Where it is: a folder, or a GGUF file.
        format: Name of its format; ``safetensors`` where nothing is quantized.
        config: Its ``quantization_config``.
        modules: Scheme of each quantized module as loaders resolve it, sorted by name. Its method
            is the format's own: how codes were chosen cannot be read from a file.
        stored: Its tensors.
        problems: Faults; empty unless it was opened with ``allow_faults``.
        model_config: The whole config.json.
    """

    folder: Path
    format: str
    config: Mapping[str, Any]
    modules: Mapping[str, Scheme]
    stored: Stored
    problems: tuple[str, ...] = ()
    model_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        if (file := find_gguf(self.folder)) is not None:
            return file.stat().st_size
        return sum(path.stat().st_size for path in weight_files(self.folder))

    def weight(self, name: str) -> QuantizedWeight:
        """Return one quantized module's weight.

        Raises:
            VerificationError: It is not quantized, or its tensors contradict each other.
        """
        if name not in self.modules:
            known = did_you_mean(name, self.modules)
            raise VerificationError(f"{self.folder} has no quantized module {name!r}.{known}")
        reader = get_format(self.format)
        return reader.unpack(name, self.modules[name], self.config, self.stored)

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that is not part of a quantized module's weight, sorted by name.

        Matrices that the file holds as [in, out] (GPT-2) come as [out, in], as in a loaded model.
        """
        suffixes: tuple[str, ...] = get_format(self.format).SUFFIXES
        owned = {f"{module}.{suffix}" for module in self.modules for suffix in suffixes}
        for name in sorted(self.stored.headers):
            if name not in owned:
                tensor = self.stored.load(name)
                yield name, tensor.T if is_transposed(self.model_config, name) else tensor


def read_checkpoint(folder: Path, *, allow_faults: bool = False) -> Checkpoint:
    """Open a checkpoint and resolve each module's scheme from config.json and shapes.

    Args:
        folder: A Hugging Face folder, or a GGUF file.
        allow_faults: Return what could be resolved, with ``problems``, instead of raising.

    Raises:
        InputError: It is no model folder, or its files are damaged.
        VerificationError: The format is unknown, or modules have faults; all are listed by name.
    """
    quantization: dict[str, Any] = {}
    model_config: dict[str, Any] = {}
    name = "gguf"
    if (file := find_gguf(folder)) is not None:
        stored = open_gguf(file)
    else:
        model_config = read_config(folder)
        quantization = read_quantization(folder, model_config)
        stored = open_stored(folder)
        name = str(quantization.get("quant_method") or "") if quantization else "safetensors"
        name = "modelopt" if name.startswith("modelopt") else name
    known = [known for known in readable_names() if known != "safetensors" or not quantization]
    if name not in known:
        held = fused_experts(stored)
        raise VerificationError(
            f"{folder}: quant_method {name!r} is not read here: "
            + (held or f"{', '.join(known)} are")
            + f".{did_you_mean(name, known)}"
        )
    try:
        found = get_format(name).find_modules(quantization, stored)
    except (TypeError, AttributeError, KeyError, IndexError, ValueError, re.error) as error:
        raise VerificationError(
            f"{folder}: quantization_config is not as {name} writes it: {error}."
        ) from error
    problems = found.problems
    if not found.modules and not problems and quantization:
        problems = (f"config.json says {name}, but no module is quantized.",)
    if problems and not allow_faults:
        raise VerificationError(f"{folder} is faulty. {join_errors(problems, _SHOWN)}")
    modules = dict(sorted(found.modules.items()))
    return Checkpoint(folder, name, quantization, modules, stored, problems, model_config)
