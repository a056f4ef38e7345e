"""Open a safetensors folder: headers first, one tensor at a time after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from advisor.errors import InputError
from advisor.formats.base import Stored, TensorHeader
from advisor.formats.layouts import full_names
from advisor.models.checkpoint import check_weight_files, weight_files
from advisor.models.config_file import read_config, read_object

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


_BESIDE = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files in which auto-gptq, autoawq and Model Optimizer first kept what config.json holds now."""


def read_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the quantization's configuration, empty where there is none.

    Args:
        folder: A model's folder.
        config: Its config.json.

    Raises:
        InputError: A file of the older kind is no JSON object.
    """
    found = config.get("quantization_config")
    if found is None:
        for name, method in _BESIDE.items():
            if (folder / name).is_file():
                found = {"quant_method": method} | read_object(folder / name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InputError(f"{folder}: quantization_config must be a JSON object, but is {found!r}.")
    return found


def open_stored(folder: Path) -> Stored:
    """Return the headers of a folder's tensors and how to read one.

    Names are whole: what an older file calls ``h.0.ln_1`` is ``transformer.h.0.ln_1``.

    Raises:
        InputError: Weights are missing, truncated, or in pickle files.
    """
    check_weight_files(folder)
    headers: dict[str, TensorHeader] = {}
    files: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - safe_open is no mapping
                part = handle.get_slice(name)
                headers[name] = TensorHeader(tuple(part.get_shape()), str(part.get_dtype()))
                files[name] = path

    config = read_config(folder) if (folder / "config.json").is_file() else {}
    whole = full_names(config, headers)
    stored_as = {full: name for name, full in whole.items()}

    def load(name: str) -> Tensor:
        stored = stored_as[name]
        with safe_open(str(files[stored]), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(stored)
            return tensor

    return Stored({whole[name]: header for name, header in headers.items()}, load)
