"""A model's folder: config.json, and the headers of its safetensors where they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.modelspec.build import build_modelspec
from advisor.modelspec.headers import StoredTensor, read_folder_headers
from advisor.modelspec.types import ModelSpec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
_QUANTIZED_SUFFIXES = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".absmax",
    "_blocks",
)


def read_model_folder(folder: Path, *, model_id: str | None = None) -> ModelSpec:
    """Describe the model in a folder.

    Shapes come from the safetensors headers where they are at hand, otherwise from config.json.

    Args:
        folder: Folder with config.json.
        model_id: What the user named; the folder where None.

    Raises:
        InputError: No config.json, broken JSON, unknown architecture, missing keys, truncated
            safetensors, or shapes that contradict the configuration.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise InputError(f"no such model folder: {folder}.")
    if not path.is_file():
        raise InputError(f"{folder} holds no config.json: it is not a Hugging Face model folder.")
    config = parse_config(path.read_bytes(), str(path))
    spec = build_modelspec(config, model_id=model_id or str(folder), where=str(path))
    return with_headers(spec, read_folder_headers(folder), str(folder))


def parse_config(text: bytes, where: str) -> dict[str, Any]:
    """Parse config.json.

    Raises:
        InputError: It is not a JSON object.
    """
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise InputError(f"{where} must hold a JSON object, but holds a {type(config).__name__}.")
    return config


def with_headers(spec: ModelSpec, stored: Mapping[str, StoredTensor], where: str) -> ModelSpec:
    """Return the spec with what the files really hold.

    A checkpoint that is already quantized keeps the tensors of its configuration: its headers
    speak of codes and scales, not of the model.

    Raises:
        InputError: A linear's shape contradicts the configuration.
    """
    if not stored or any(name.endswith(_QUANTIZED_SUFFIXES) for name in stored):
        return spec
    expected = {tensor.name: tensor for tensor in spec.tensors}
    wrong = [
        f"{name} is {list(tensor.shape)}, config.json says {list(expected[name].shape)}"
        for name, tensor in stored.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if wrong:
        raise InputError(f"{where}: {len(wrong)} tensors contradict config.json: {wrong[0]}.")
    codes = [
        f"{name} as {tensor.dtype}"
        for name, tensor in stored.items()
        if name in expected and tensor.dtype in _INTEGERS
    ]
    if codes:
        raise InputError(
            f"{where}: {len(codes)} weights are stored as integers (first: {codes[0]}), but "
            "nothing says with which scales. Give the 16-bit checkpoint that it was made from."
        )
    if not expected.keys() & stored.keys():
        # Other names than transformers writes (an older or a foreign checkpoint): the sizes from
        # the configuration are the better guess.
        dtype = _main_dtype(stored) or spec.dtype
        width = 4 if dtype == "float32" else 2
        tensors = tuple(replace(tensor, width=width) for tensor in spec.tensors)
        return replace(spec, tensors=tensors, dtype=dtype)
    head = {name for name in stored if name.startswith("lm_head.")}
    untied = bool(spec.tied_embeddings and head)
    extra = tuple(
        TensorSpec(name, tensor.shape, "other", width=_width(tensor))
        for name, tensor in stored.items()
        if name not in expected and not (spec.tied_embeddings and name in head)
    )
    kept = tuple(
        replace(tensor, width=_width(stored[tensor.name]))
        for tensor in spec.tensors
        if tensor.name in stored
    )
    linear_names = {f"{linear.name}.weight" for linear in spec.linears}
    if missing := sorted(linear_names & expected.keys() - stored.keys()):
        raise InputError(
            f"{where} lacks {len(missing)} of the weights that config.json speaks of "
            f"(first: {missing[0]}). Download the model again."
        )
    return replace(
        spec,
        tensors=kept + extra,
        source="safetensors",
        stored_untied=untied,
        dtype=_main_dtype(stored) or spec.dtype,
    )


def _width(tensor: StoredTensor) -> int:
    """Return the bytes of each element."""
    return tensor.size_bytes // max(1, math.prod(tensor.shape))


def _main_dtype(stored: Mapping[str, StoredTensor]) -> str | None:
    """Return the data type that holds most bytes, None where it is not a floating one."""
    bytes_of: dict[str, int] = {}
    for tensor in stored.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.size_bytes
    return _DTYPES.get(max(bytes_of, key=lambda dtype: bytes_of[dtype]))
