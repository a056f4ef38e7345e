"""Checkpoints as models: 16-bit folders and quantized ones, opened alike."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from advisor.errors import InputError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.numerics.quantized_weight import QuantizedWeight

_LISTED = 3


class CheckpointWeights(Mapping[str, "QuantizedWeight"]):
    """A checkpoint's codes by module, each read when it is asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Name the checkpoint; nothing is read."""
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> QuantizedWeight:
        """Read one module's codes."""
        if name not in self._checkpoint.modules:
            raise KeyError(name)
        return self._checkpoint.weight(name)

    def __iter__(self) -> Iterator[str]:
        """Go over the modules' names."""
        return iter(self._checkpoint.modules)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self._checkpoint.modules)


def contents(
    checkpoint: Checkpoint, loaded: LoadedModel
) -> tuple[Mapping[str, QuantizedWeight], dict[str, Tensor]]:
    """Return a checkpoint's codes, and its 16-bit tensors that differ from the loaded model's.

    Args:
        checkpoint: What was read.
        loaded: The model whose place its weights take.
    """
    names = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    replaced = {}
    for name, tensor in checkpoint.other_tensors():
        if name in names:
            stored = tensor.to(loaded.dtype)
            if not torch.equal(stored, loaded.host_tensor(name)):
                replaced[name] = stored
    return CheckpointWeights(checkpoint), replaced


@contextmanager
def opened(folder: Path, device: torch.device | str = "cpu") -> Iterator[LoadedModel]:
    """Yield a checkpoint of any format as a model in float32 that computes as it will be served.

    Args:
        folder: A 16-bit model, or a quantized checkpoint with config.json and tokenizer.
        device: Where it computes.

    Raises:
        InputError: It has no config.json or tokenizer, or lacks tensors of its model.
        VerificationError: Its modules have faults.
    """
    from advisor.evaluation.runtime import quantized_model
    from advisor.formats.read import read_checkpoint
    from advisor.models.device import indexed
    from advisor.models.load import load_model

    checkpoint = read_checkpoint(folder)
    if checkpoint.format == "safetensors":
        yield load_model(folder, device=device)
        return
    weights = CheckpointWeights(checkpoint)
    loaded = _filled(folder, checkpoint, weights, indexed(device))
    with quantized_model(loaded.model, weights):
        yield loaded


def _filled(
    folder: Path,
    checkpoint: Checkpoint,
    weights: Mapping[str, QuantizedWeight],
    device: torch.device,
) -> LoadedModel:
    """Return a quantized checkpoint's model, its weights dequantized, with its tokenizer."""
    import transformers

    from advisor.models.casting import watch
    from advisor.models.config_file import read_config
    from advisor.models.device import place
    from advisor.models.inspect import find_linears
    from advisor.models.load import LoadedModel
    from advisor.plan.hashing import sha256_files, sha256_json

    config = read_config(folder)
    config.pop("quantization_config", None)
    try:
        settings: Any = transformers.AutoConfig.for_model(**config)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} could not be opened as a model: {first}") from error
    model.eval().requires_grad_(False)
    _fill(model, checkpoint, weights)
    place(model, device)
    watch(model, torch.float32, None, device)
    files = [
        path
        for pattern in ("config.json", "*.safetensors", "*.gguf")
        for path in folder.glob(pattern)
    ]
    fingerprint = sha256_json(["quantized", sha256_files(files)])
    reason = "its weights are dequantized"
    return LoadedModel(
        model, tokenizer, folder, find_linears(model), torch.float32, reason, fingerprint
    )


def _fill(model: nn.Module, checkpoint: Checkpoint, weights: Mapping[str, QuantizedWeight]) -> None:
    """Give a model every tensor of a checkpoint.

    Raises:
        InputError: Tensors are missing or of another shape; all are counted.
    """
    parameters = dict(model.named_parameters())
    values: dict[str, Tensor] = dict(checkpoint.other_tensors())
    missing = [
        name
        for name in parameters
        if name not in values and name.removesuffix(".weight") not in weights
    ]
    wrong = [
        name
        for name, tensor in values.items()
        if name in parameters and tensor.shape != parameters[name].shape
    ]
    wrong += [
        name
        for name, weight in weights.items()
        if f"{name}.weight" in parameters
        and tuple(parameters[f"{name}.weight"].shape) != weight.shape
    ]
    unknown = [name for name in weights if f"{name}.weight" not in parameters]
    if missing or wrong or unknown:
        names = missing + wrong + unknown
        raise InputError(
            f"{checkpoint.folder} does not hold what its config.json describes: {len(names)} "
            f"tensors are missing or of another shape (first: {', '.join(names[:_LISTED])})."
        )
    for name, parameter in parameters.items():
        module = name.removesuffix(".weight")
        value = weights[module].dequantize() if module in weights else values[name]
        parameter.data = value.to(parameter.dtype)
    broken = [name for name, value in parameters.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise VerificationError(
            f"{checkpoint.folder} has weights that are not finite in {len(broken)} tensors "
            f"(first: {', '.join(broken[:_LISTED])})."
        )
