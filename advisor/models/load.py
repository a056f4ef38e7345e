"""Load a model for calibration and evaluation; everything that can be wrong is said before.

Loading itself holds one part of a tensor in memory, where the weights can be mapped.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from advisor.errors import InputError
from advisor.models.allocator import give_back, map_large_tensors
from advisor.models.architectures import get_architecture
from advisor.models.casting import casting_of, watch
from advisor.models.checkpoint import check_weight_files
from advisor.models.config_file import read_config
from advisor.models.device import CPU, indexed, place
from advisor.models.inspect import find_linears
from advisor.models.layout import as_stored
from advisor.models.mapping import map_model
from advisor.plan.hashing import hash_model, sha256_json

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.models.casting import Casting
    from advisor.modelspec import LinearSpec

_LISTED = 5
_CHECKED_AT_ONCE = 1 << 20
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedModel:
    """A model in evaluation mode, without gradients on its parameters.

    Attributes:
        model: The transformers model; its parameters are in the stored type, and in ``dtype``
            while they compute.
        tokenizer: Its tokenizer.
        folder: Where it was read from.
        linears: Every quantizable linear, in execution order.
        dtype: Data type that the model computes in.
        not_mapped: Why the weights are held in memory whole; empty where they are mapped.
    """

    model: nn.Module
    tokenizer: Any
    folder: Path
    linears: tuple[LinearSpec, ...]
    dtype: torch.dtype
    not_mapped: str = ""
    _fingerprint: str = field(default="", repr=False)

    @property
    def fingerprint(self) -> str:
        """sha256 of the weights and the configuration: what decides the model's outputs."""
        if not self._fingerprint:
            hashes = hash_model(self.folder)
            self._fingerprint = sha256_json([hashes.config, hashes.weights])
        return self._fingerprint

    @property
    def device(self) -> torch.device:
        """Where the model computes; its stored weights stay in host memory."""
        return casting_of(self.model).device

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of the model's parameters as it computes, on its device; not to be changed.

        Of a mapped model nothing but what is returned stays in memory.
        """
        return casting_of(self.model).read(self.model.get_parameter(name))

    def host_tensor(self, name: str) -> torch.Tensor:
        """Return what :meth:`tensor` does, in host memory."""
        return casting_of(self.model).read(self.model.get_parameter(name), CPU)


def check_model_folder(folder: Path) -> None:
    """Check what can be checked without reading the weights.

    Args:
        folder: A Hugging Face model folder.

    Raises:
        InputError: Missing folder or config.json, unknown architecture, already quantized,
            pickle-only weights, a missing or truncated safetensors file, no tokenizer.
    """
    config = read_config(folder)
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise InputError(f"{folder / 'config.json'} names no architecture (key 'architectures').")
    get_architecture(str(names[0]))
    if quantization := config.get("quantization_config"):
        named = isinstance(quantization, dict) and quantization.get("quant_method")
        method = named or "by a method that config.json does not name"
        raise InputError(
            f"{folder} is already quantized ({method}). Give the 16-bit model it was made from."
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder} holds a GGUF file ({gguf[0].name}), which is quantized already. Give the "
            "16-bit model it was made from."
        )
    check_weight_files(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(
            f"{folder} has no tokenizer.json and no tokenizer.model. Copy the tokenizer's files of "
            "the original model into it."
        )


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> LoadedModel:
    """Load a model and its tokenizer from a folder; nothing is fetched, no remote code is run.

    Weights stay in their stored type, mapped from the files where they can be
    (:mod:`advisor.models.mapping`), and are cast part by part while they compute
    (:mod:`advisor.models.casting`): memory holds one block in float32.

    From then on the process gives back what large tensors took (:mod:`advisor.models.allocator`).

    Args:
        folder: A Hugging Face model folder.
        dtype: Data type to compute in; float32 is the honest one for comparing weights.
        device: Where the model computes. Weights stay in host memory, whatever it is; the device
            gets one part at a time.

    Raises:
        InputError: See :func:`check_model_folder`; tensors are missing, of a wrong shape, or hold
            values that are not finite.
    """
    folder = Path(folder)
    check_model_folder(folder)
    map_large_tensors()
    import transformers

    bars = transformers.utils.logging
    had_bars = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        found = map_model(folder, dtype)
        if isinstance(found, str):
            model, mapped, reason = _load_whole(folder, dtype), None, found
            logger.warning("%s is held in memory whole, in %s: %s", folder, dtype, found)
        else:
            (model, mapped), reason = found, ""
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} could not be loaded by transformers: {first}") from error
    finally:
        if had_bars:
            bars.enable_progress_bar()
    as_stored(model)
    model.eval().requires_grad_(False)
    place(model, indexed(device))
    casting = watch(model, dtype, mapped, indexed(device))
    _check_finite(folder, model, casting)
    give_back()
    return LoadedModel(model, tokenizer, folder, find_linears(model), dtype, reason)


def _load_whole(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a model as transformers does, converted whole to a type."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    _check_loading(folder, info)
    loaded: nn.Module = model
    return loaded


def _check_loading(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that leaves weights at random values."""
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    if missing or mismatched:
        names = missing + mismatched
        raise InputError(
            f"{folder} does not hold what its config.json describes: {len(names)} tensors are "
            f"missing or of another shape (first: {', '.join(names[:_LISTED])})."
        )


def _is_finite(values: Tensor) -> bool:
    """Return whether no value is NaN or infinite; a NaN is its part's least and largest value."""
    wide = values.float() if values.dtype.itemsize == 1 else values
    return not wide.numel() or all(bool(edge.isfinite()) for edge in wide.aminmax())


def _check_finite(folder: Path, model: nn.Module, casting: Casting) -> None:
    """Refuse NaN and infinite weights, naming the tensors."""
    broken = []
    for name, parameter in model.named_parameters():
        parts = torch.split(casting.stored(parameter).flatten(), _CHECKED_AT_ONCE)
        if not all(_is_finite(part) for part in parts):
            broken.append(name)
        casting.release(parameter)
    if broken:
        raise InputError(
            f"{folder} has weights that are not finite (NaN or infinity) in {len(broken)} tensors "
            f"(first: {', '.join(broken[:_LISTED])}). The checkpoint is damaged or overflowed."
        )
