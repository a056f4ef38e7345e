"""16-bit safetensors: a model as it is, perhaps with folded scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.formats.base import Found, Stored, list_some
from advisor.formats.read_only import companions as companions
from advisor.formats.read_only import quantization_config as quantization_config
from advisor.formats.read_only import storage_scheme as storage_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from advisor.formats.base import Planned
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

NAME = "safetensors"
SUFFIXES: tuple[str, ...] = ()


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored: here, all of them."""
    if not weights:
        return []
    return [
        f"format 'safetensors' holds 16-bit weights only, but got {list_some(list(weights))} "
        "quantized. Use gptq, awq, compressed-tensors or bitsandbytes."
    ]


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Never called: :func:`problems` refuses every weight.

    Raises:
        InputError: Always.
    """
    del weight, config, dtype
    raise InputError(f"format 'safetensors' holds 16-bit weights only, but {name} is quantized.")


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return False: nothing is quantized."""
    del name, config
    return False


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Return that nothing is quantized."""
    del config, stored
    return Found({}, ())


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Never called: no module is quantized.

    Raises:
        InputError: Always.
    """
    del scheme, config, stored
    raise InputError(f"{name} is not quantized.")
