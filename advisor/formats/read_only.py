"""What formats that Advisor reads, but does not write, answer to a writer.

vLLM, SGLang and TensorRT-LLM read the same numbers from compressed-tensors or have them made by
their own tools. Formats that are written otherwise than module by module (GGUF, 16-bit files) take
from here the answers that are as empty for them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.formats.base import list_some

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from torch import Tensor

    from advisor.formats.base import Planned, Stored
    from advisor.numerics.quantized_weight import QuantizedWeight
    from advisor.schemes import Scheme

CODES = ("F8_E4M3", "U8")
"""Data types of weights that only a quantization explains."""


def problems(weights: Mapping[str, QuantizedWeight | Planned]) -> list[str]:
    """Return why these weights cannot be stored: here, all of them."""
    if not weights:
        return []
    return [
        f"this format is read here, but not written ({list_some(list(weights))}). "
        "Use compressed-tensors, which holds the same numbers."
    ]


def storage_scheme(scheme: Scheme) -> Scheme:
    """Return the scheme itself."""
    return scheme


def quantization_config(
    weights: Mapping[str, QuantizedWeight], unquantized: Sequence[str]
) -> dict[str, Any]:
    """Return an empty configuration: config.json is not what says how weights are stored."""
    del weights, unquantized
    return {}


def companions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return none: there is no further file of settings."""
    del config
    return {}


def pack(
    name: str, weight: QuantizedWeight, config: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Never called: :func:`problems` refuses every weight.

    Raises:
        InputError: Always.
    """
    del weight, config, dtype
    raise InputError(f"{name}: this format is read here, but not written. Use compressed-tensors.")


def with_codes(stored: Stored, suffixes: Sequence[str]) -> list[str]:
    """Return, sorted, the modules with one of these tensors or a weight that is codes."""
    names = set(stored.modules_with(suffixes))
    names |= {
        name
        for name in stored.modules_with(("weight",))
        if stored.headers[f"{name}.weight"].dtype in CODES
    }
    return sorted(names)


def fused_experts(stored: Stored) -> str:
    """Say what is in a file of gpt-oss's MXFP4; empty where there are no such blocks.

    Experts lie in one tensor per layer, ``..._blocks`` (U8 [experts, outputs, inputs / 32, 16]: two
    E2M1 codes a byte) with ``..._scales`` (U8 [experts, outputs, inputs / 32]: E8M0 exponents).
    """
    blocks = {
        name: header
        for name, header in stored.headers.items()
        if name.endswith("_blocks") and header.dtype == "U8" and len(header.shape) == 4
    }
    if not blocks:
        return ""
    weights = sum(2 * math.prod(header.shape) for header in blocks.values())
    experts = next(iter(blocks.values())).shape[0]
    bare = [
        name for name in blocks if f"{name.removesuffix('_blocks')}_scales" not in stored.headers
    ]
    missing = f", {len(bare)} of them without scales (first: {bare[0]})" if bare else ""
    return (
        f"it holds {len(blocks)} tensors of MXFP4 blocks{missing} for {experts} fused experts a "
        f"layer, {weights / 1e9:.3g} billion weights in 4.25 bits each, and "
        f"{len(stored.headers) - 2 * len(blocks) + len(bare)} other tensors as they are; "
        "transformers, vLLM, SGLang and TensorRT-LLM have kernels of their own for these experts"
    )
