"""Checkpoints of NVIDIA's Model Optimizer (``quant_method: modelopt``), FP8 and NVFP4. Only read.

What a module is says ``quant_algo``, in config.json or in hf_quant_config.json, for all modules
that no pattern of ``ignore`` or ``exclude_modules`` names, or for each in ``quantized_layers``:

- ``FP8``: ``weight`` (E4M3), single ``weight_scale`` and ``input_scale``.
- ``FP8_PER_CHANNEL_PER_TOKEN``: ``weight_scale`` [out]; inputs rounded per token.
- ``FP8_PB_WO``: ``weight_scale`` [out / 128, 1, in / 128, 1]; inputs per token and block.
- ``NVFP4``, ``W4A16_NVFP4``: ``weight`` (two E2M1 codes a byte, the even input in the low half),
  ``weight_scale`` (E4M3 per 16 inputs), ``weight_scale_2`` and ``input_scale``, by which those and
  the inputs' are *multiplied*: reciprocals of what compressed-tensors has.
- ``MXFP8``: ``weight`` (E4M3), ``weight_scale`` (E8M0 exponents per 32 inputs).

Reference: vLLM ``quantization/modelopt.py``; TensorRT-LLM ``_torch/model_config.py``
(``_build_modelopt_quant_config``).

Where linears that vLLM fuses have different ``weight_scale`` (FP8) or ``weight_scale_2``, it takes
the largest for all of them, which is not simulated here.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch

from advisor.formats.base import HEAD, Found, check_single, check_tensor, first_fault
from advisor.formats.read_only import (
    companions as companions,
)
from advisor.formats.read_only import (
    pack as pack,
)
from advisor.formats.read_only import (
    problems as problems,
)
from advisor.formats.read_only import (
    quantization_config as quantization_config,
)
from advisor.formats.read_only import (
    storage_scheme as storage_scheme,
)
from advisor.formats.read_only import (
    with_codes,
)
from advisor.numerics.microscaling import (
    MICROSCALED_WIDTHS,
    decode_e8m0,
    e2m1_codebook,
    unpack_e2m1,
)
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from advisor.formats.base import Stored

NAME = "modelopt"
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale")
_SCHEMES = {
    "FP8": "rtn-fp8-gtensor-afp8-static",
    "FP8_PER_CHANNEL_PER_TOKEN": "rtn-fp8-gch-afp8",
    "FP8_PB_WO": "rtn-fp8-b128-afp8",
    "FP8_BLOCK_SCALES": "rtn-fp8-b128-afp8",
    "NVFP4": "nvfp4-anvfp4",
    "W4A16_NVFP4": "nvfp4",
    "MXFP8": "mxfp8-amxfp8",
}
_MIXED = "MIXED_PRECISION"


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings: hf_quant_config.json has them under ``quantization``."""
    found: Mapping[str, Any] = config.get("quantization") or config
    return found


def algorithm(name: str, config: Mapping[str, Any]) -> str | None:
    """Return a module's ``quant_algo`` in capitals; None where it stays in 16 bits."""
    settings = settings_of(config)
    patterns = [*(settings.get("exclude_modules") or ()), *(settings.get("ignore") or ())]
    if any(fnmatchcase(name, entry) or f"{name}.".startswith(f"{entry}.") for entry in patterns):
        return None
    found = str(settings.get("quant_algo") or "").upper()
    if found != _MIXED:
        return found
    layer = (settings.get("quantized_layers") or {}).get(name)
    return None if layer is None else str(layer["quant_algo"]).upper()


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized: no pattern excludes it."""
    return name != HEAD and algorithm(name, config) is not None


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module by its ``quant_algo``, and check its tensors."""
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    for name in with_codes(stored, SUFFIXES[1:]):
        algo = algorithm(name, config)
        if algo is None:
            faults.append(f"{name}: its settings keep it 16-bit, but its tensors are quantized.")
            continue
        if algo not in _SCHEMES:
            faults.append(f"{name}: quant_algo {algo!r} is not read here: {', '.join(_SCHEMES)}.")
            continue
        scheme = parse_scheme(_SCHEMES[algo])
        wrong = _check(name, scheme, stored)
        faults.extend(wrong)
        if not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def _check(name: str, scheme: Scheme, stored: Stored) -> list[str]:
    """Return the faults of one module's tensors."""
    header = stored.headers.get(f"{name}.weight")
    if header is None or len(header.shape) != 2:
        return [f"{name} has no weight: the tensor '{name}.weight' is missing or no matrix."]
    rows, columns = header.shape
    wrong: list[str | None] = []
    if scheme.weight == "nvfp4":
        wrong.append(check_tensor(stored, name, "weight", header.shape, ("U8",)))
        columns *= 2
    else:
        wrong.append(check_tensor(stored, name, "weight", header.shape, ("F8_E4M3",)))
    if scheme.weight in MICROSCALED_WIDTHS:
        width = MICROSCALED_WIDTHS[scheme.weight]
        if columns % width:
            return [f"{name}: groups of {width} do not divide in_features={columns}."]
        kinds = ("F8_E4M3",) if scheme.weight == "nvfp4" else ("U8",)
        wrong.append(check_tensor(stored, name, "weight_scale", (rows, columns // width), kinds))
    elif scheme.granularity == "tensor":
        wrong.append(check_single(stored, name, "weight_scale"))
    else:
        size = 128 if scheme.granularity == "block" else None
        wrong.append(_check_scales(stored, name, (rows, columns), size))
    if scheme.weight == "nvfp4":
        wrong.append(check_single(stored, name, "weight_scale_2", ("F32",)))
    if scheme.static_activation or scheme.activation == "nvfp4":
        wrong.append(check_single(stored, name, "input_scale"))
    return first_fault(wrong, f"its settings say {scheme}")


def _check_scales(
    stored: Stored, name: str, shape: tuple[int, int], size: int | None
) -> str | None:
    """Check scales per channel or block, which may have dimensions of one in between."""
    header = stored.headers.get(f"{name}.weight_scale")
    expected: tuple[int, ...] = (shape[0],)
    if size is not None:
        expected = (-(-shape[0] // size), -(-shape[1] // size))
    if header is not None and tuple(n for n in header.shape if n != 1) == tuple(
        n for n in expected if n != 1
    ):
        expected = header.shape
    return check_tensor(stored, name, "weight_scale", expected)


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    weight, scales = (stored.load(f"{name}.{part}") for part in ("weight", "weight_scale"))
    extras: dict[str, Tensor] = {}
    if scheme.weight == "nvfp4":
        overall = _single(name, "weight_scale_2", stored)
        extras["global_scale"] = overall.reciprocal()
        if scheme.activation is not None:
            extras["input_global_scale"] = _single(name, "input_scale", stored).reciprocal()
        scales = scales.to(torch.float32) * overall
        return QuantizedWeight(
            scheme, unpack_e2m1(weight), scales, codebook=e2m1_codebook(), extras=extras
        )
    if scheme.weight == "mxfp8":
        return QuantizedWeight(scheme, weight.view(torch.uint8), decode_e8m0(scales))
    if scheme.static_activation:
        extras["input_scale"] = _single(name, "input_scale", stored)
    rows = -(-weight.shape[0] // 128) if scheme.granularity == "block" else weight.shape[0]
    rows = 1 if scheme.granularity == "tensor" else rows
    scales = scales.to(torch.float32).reshape(rows, -1)
    return QuantizedWeight(scheme, weight.view(torch.uint8), scales, extras=extras)


def _single(name: str, suffix: str, stored: Stored) -> Tensor:
    """Return a tensor of one number, float32 [1]."""
    return stored.load(f"{name}.{suffix}").to(torch.float32).reshape(1)
