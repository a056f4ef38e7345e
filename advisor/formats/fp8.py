"""FP8 checkpoints with ``quant_method: fp8``: DeepSeek's, Qwen's and transformers' own. Only read.

A module has ``weight`` (E4M3 [out, in]) and a float scale to multiply it with: one for blocks of
``weight_block_size`` each, called ``weight_scale_inv`` for all that, or a single ``weight_scale``.
Inputs are rounded at run time to E4M3 with a scale per token and block (``activation_scheme:
dynamic``; without blocks: per token), or with the module's ``input_scale`` (``static``).

Reference: vLLM ``quantization/fp8.py`` (Fp8Config, Fp8LinearMethod); transformers
``integrations/finegrained_fp8.py``.

Where linears that vLLM fuses have different single scales, it rounds them again with the largest of
them, which is not simulated here.
"""

from __future__ import annotations

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
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.formats.base import Stored

NAME = "fp8"
SUFFIXES = ("weight", "weight_scale", "weight_scale_inv", "input_scale", "activation_scale")
_SCALES = ("weight_scale", "weight_scale_inv")
_INPUTS = ("input_scale", "activation_scale")


def expects(name: str, config: Mapping[str, Any]) -> bool:
    """Return whether loaders expect a linear to be quantized: no entry names it or what it is in.

    vLLM calls the list ``ignored_layers``, transformers ``modules_to_not_convert``; an entry is a
    module's path, the start of one, or its last part.
    """
    kept = [*(config.get("ignored_layers") or ()), *(config.get("modules_to_not_convert") or ())]
    within = any(f"{name}.".startswith(f"{entry}.") or name.endswith(f".{entry}") for entry in kept)
    return name != HEAD and not within


def find_modules(config: Mapping[str, Any], stored: Stored) -> Found:
    """Resolve every module by its configuration, and check its tensors."""
    activation = config.get("activation_scheme", "dynamic")
    block = config.get("weight_block_size")
    if activation not in ("dynamic", "static"):
        return Found({}, (f"fp8: activation_scheme {activation!r} is neither dynamic nor static.",))
    size = _square(block)
    if block is not None and size is None:
        return Found({}, (f"fp8: weight_block_size {block!r} is unknown: squares are read here.",))
    if block is not None and activation == "static":
        return Found(
            {}, ("fp8: blocks of weights with static activations are unknown to loaders.",)
        )
    scheme = Scheme(
        "rtn", "fp8", granularity="tensor" if size is None else "block", group_size=size,
        activation="fp8", static_activation=activation == "static",
    )  # fmt: skip
    modules: dict[str, Scheme] = {}
    faults: list[str] = []
    for name in with_codes(stored, (*_SCALES, *_INPUTS)):
        if not expects(name, config):
            faults.append(f"{name}: config.json keeps it 16-bit, but its tensors are quantized.")
            continue
        wrong = _check(name, scheme, stored)
        faults.extend(wrong)
        if not wrong:
            modules[name] = scheme
    return Found(modules, tuple(faults))


def _square(block: Any) -> int | None:
    """Return the side of a square block, None where it is none."""
    if not isinstance(block, (list, tuple)) or len(block) != 2 or block[0] != block[1]:
        return None
    return block[0] if isinstance(block[0], int) and block[0] > 0 else None


def _check(name: str, scheme: Scheme, stored: Stored) -> list[str]:
    """Return the faults of one module's tensors."""
    header = stored.headers.get(f"{name}.weight")
    if header is None or len(header.shape) != 2:
        return [f"{name} has no weight: the tensor '{name}.weight' is missing or no matrix."]
    wrong = [check_tensor(stored, name, "weight", header.shape, ("F8_E4M3",))]
    suffix = _found(stored, name, _SCALES) or _SCALES[scheme.granularity == "block"]
    if scheme.granularity == "block":
        size = int(scheme.group_size or 1)
        blocks = (-(-header.shape[0] // size), -(-header.shape[1] // size))
        wrong.append(check_tensor(stored, name, suffix, blocks))
    else:
        wrong.append(check_single(stored, name, suffix))
    if scheme.static_activation:
        wrong.append(check_single(stored, name, _found(stored, name, _INPUTS) or _INPUTS[0]))
    return first_fault(wrong, f"config.json says {scheme}")


def _found(stored: Stored, name: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the first of some tensors that a module has."""
    return next((s for s in suffixes if f"{name}.{s}" in stored.headers), None)


def unpack(name: str, scheme: Scheme, config: Mapping[str, Any], stored: Stored) -> QuantizedWeight:
    """Return the weight of one module."""
    del config
    scales = stored.load(f"{name}.{_found(stored, name, _SCALES)}").to(torch.float32)
    extras = {}
    if scheme.static_activation:
        given = stored.load(f"{name}.{_found(stored, name, _INPUTS)}")
        extras["input_scale"] = given.to(torch.float32).reshape(1)
    return QuantizedWeight(
        scheme=scheme,
        codes=stored.load(f"{name}.weight").view(torch.uint8),
        scales=scales if scheme.granularity == "block" else scales.reshape(1, 1),
        extras=extras,
    )
