"""Quantization schemes: one frozen value, printed and parsed as ``gptq-int4-g128-sym``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from advisor.errors import InputError, did_you_mean

Granularity = Literal["none", "tensor", "channel", "group", "block"]

GGUF_BITS_PER_WEIGHT: dict[str, float] = {
    "q2_k": 2.625,
    "q3_k": 3.4375,
    "iq4_nl": 4.5,
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q4_k": 4.5,
    "q5_0": 5.5,
    "q5_1": 6.0,
    "q5_k": 5.5,
    "q6_k": 6.5625,
    "q8_0": 8.5,
}
"""Bits per weight of each GGUF block type, scales included (llama.cpp, ggml-common.h)."""

GGUF_MIXTURES: tuple[str, ...] = (
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m",
    "q5_0", "q5_1", "q5_k_s", "q5_k_m", "q6_k", "q8_0",
)  # fmt: skip
"""File types of llama.cpp's quantizer; the ``_s``, ``_m``, ``_l`` ones mix block types."""

GGUF_BLOCKS: tuple[str, ...] = (
    "q2_k", "q3_k", "q4_0", "q4_1", "iq4_nl", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0",
)  # fmt: skip
"""Block types: what one tensor of a GGUF file is stored in."""

_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_WEIGHTS_OF_METHOD: dict[str, tuple[str, ...]] = {
    "rtn": (*_INTEGERS, "fp8"),
    "gptq": (*_INTEGERS, "fp8"),
    "awq": _INTEGERS,
    "smoothquant": ("int8", "fp8"),
    "hqq": _INTEGERS,
    "autoround": _INTEGERS,
    "bnb": ("nf4", "fp4"),
    "gguf": tuple(dict.fromkeys((*GGUF_MIXTURES, *GGUF_BLOCKS))),
}
_SINGLE_NAMES = ("bf16", "fp16", "fp32", "llm.int8", "mxfp4", "mxfp8", "nvfp4")
_WEIGHT_BITS = {
    "bf16": 16, "fp16": 16, "fp32": 32, "fp8": 8, "nf4": 4, "fp4": 4,
    "mxfp4": 4, "mxfp8": 8, "nvfp4": 4,
}  # fmt: skip
ACTIVATIONS = ("int8", "fp8", "mxfp4", "mxfp8", "nvfp4")
"""Types that inputs are rounded to at run time."""
METHODS: tuple[str, ...] = (*_WEIGHTS_OF_METHOD, *_SINGLE_NAMES, "mixed")
"""Every first part of a scheme's name."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Everything that decides the stored bits of a module and its runtime arithmetic.

    Attributes:
        method: Algorithm that chooses the codes: ``rtn``, ``gptq``, ``awq``, ...
        weight: Storage data type: ``int4``, ``fp8``, ``nf4``, ``q4_k_m``, ``bf16``, ...
        granularity: What one scale covers: a whole tensor, an output channel, ``group_size``
            consecutive inputs of a channel, or a ``group_size`` × ``group_size`` block.
        group_size: Inputs that share a scale; -1 per output channel; None where the data type
            fixes it or there is no scale.
        symmetric: Whether the grid has no zero point; None where the data type decides.
        activation_order: GPTQ's act-order (``desc_act``).
        activation: Data type that inputs are quantized to at run time, per token; None for 16-bit.
        static_activation: Inputs take one scale, from calibration, instead of one per token.
        double_quantization: bitsandbytes' quantized scales.
        target_bits: Average bits per weight of a mixture (``mixed-4.25bpw``), else None.
    """

    method: str
    weight: str
    granularity: Granularity = "none"
    group_size: int | None = None
    symmetric: bool | None = None
    activation_order: bool = False
    activation: str | None = None
    static_activation: bool = False
    double_quantization: bool = False
    target_bits: float | None = None

    def __post_init__(self) -> None:
        """Reject impossible combinations: a Scheme that exists is one that means something."""
        if self.method in _WEIGHTS_OF_METHOD and self.weight not in _WEIGHTS_OF_METHOD[self.method]:
            known = _WEIGHTS_OF_METHOD[self.method]
            raise InputError(
                f"method {self.method!r} stores weights as one of {', '.join(known)}, "
                f"but got {self.weight!r}.{did_you_mean(self.weight, known)}"
            )
        if self.granularity in ("group", "block") and (self.group_size or 0) < 1:
            raise InputError(f"group_size must be at least 1, but got {self.group_size}.")
        if self.activation_order and self.method != "gptq":
            raise InputError(
                f"act-order is a setting of gptq, but the method is {self.method!r}. "
                "Drop -actorder or use gptq."
            )
        if self.activation is not None and self.activation not in ACTIVATIONS:
            raise InputError(
                f"activations are quantized to one of {', '.join(ACTIVATIONS)}, "
                f"but got {self.activation!r}.{did_you_mean(self.activation, ACTIVATIONS)}"
            )
        if self.static_activation and (
            self.activation not in ("int8", "fp8") or self.granularity not in ("tensor", "channel")
        ):
            raise InputError(
                "inputs with one calibrated scale are int8 or fp8, and go with weight scales per "
                f"channel or tensor, but got {self.weight} per {self.granularity} with "
                f"{self.activation or '16-bit'} inputs. Drop -static."
            )

    @property
    def bits(self) -> float:
        """Bits of one stored code, scales and zero points not counted."""
        if self.target_bits is not None:
            return self.target_bits
        if self.weight in _WEIGHT_BITS:
            return _WEIGHT_BITS[self.weight]
        if match := re.fullmatch(r"int(\d)", self.weight):
            return int(match[1])
        return int(self.weight.lstrip("iq")[0])  # q4_k_m, iq4_nl and their like

    @property
    def is_quantized(self) -> bool:
        """Whether weights are stored in fewer than 16 bits."""
        return self.bits < 16

    @property
    def transform(self) -> str | None:
        """Function-preserving rescaling that the method applies before it rounds."""
        return {"awq": "awq-scale", "smoothquant": "smoothquant"}.get(self.method)

    @property
    def is_integer(self) -> bool:
        """Whether codes lie on an affine integer grid."""
        return self.weight.startswith("int")

    def __str__(self) -> str:
        """Print the canonical name, the inverse of :func:`parse_scheme`."""
        if self.method == "mixed":
            return f"mixed-{self.target_bits:g}bpw"
        parts = [self.method] if self.method in _SINGLE_NAMES else [self.method, self.weight]
        if self.granularity == "channel":
            parts.append("gch")
        elif self.granularity == "tensor":
            parts.append("gtensor")
        elif self.granularity == "group":
            parts.append(f"g{self.group_size}")
        elif self.granularity == "block":
            parts.append(f"b{self.group_size}")
        if self.symmetric is not None:
            parts.append("sym" if self.symmetric else "asym")
        if self.activation_order:
            parts.append("actorder")
        if self.double_quantization:
            parts.append("dq")
        if self.activation is not None:
            parts.append(f"a{self.activation}")
        if self.static_activation:
            parts.append("static")
        return "-".join(parts)


BF16 = Scheme("bf16", "bf16")
"""The unquantized scheme."""


def _with_its_method(text: str) -> str:
    """Return `` Did you mean ...?`` where only the method is missing: q4_k_m, nf4, int4-g128."""
    weight = text.partition("-")[0]
    methods = [method for method, known in _WEIGHTS_OF_METHOD.items() if weight in known]
    if not methods:
        return ""
    return f" Did you mean {' or '.join(repr(f'{method}-{text}') for method in methods[:3])}?"


def parse_scheme(name: str) -> Scheme:
    """Parse a scheme's name.

    The grammar is
    ``METHOD-WEIGHT[-gN|-gch|-gtensor|-bN][-sym|-asym][-actorder][-dq][-aACT[-static]]``;
    ``bf16``, ``llm.int8``, ``mxfp4``, ``nvfp4`` and ``mixed-4.25bpw`` stand alone (the micro-scaled
    ones may take ``-aACT``).

    Raises:
        InputError: A part is unknown (with the nearest known one), missing or repeated.
    """
    text = name.strip().lower()
    if match := re.fullmatch(r"mixed-(\d+(?:\.\d+)?)bpw", text):
        return Scheme("mixed", "mixed", target_bits=float(match[1]))
    head, *rest = text.split("-")
    if head == "mixed":
        raise InputError(f"a mixture is named mixed-<bits>bpw, as mixed-4.25bpw, but got {name!r}.")
    if head in _SINGLE_NAMES:
        weight = "int8" if head == "llm.int8" else head
        fields = _parse_suffixes(name, rest, only_activation=True)
        return Scheme(head, weight, **fields)
    if head not in _WEIGHTS_OF_METHOD:
        raise InputError(
            f"unknown method {head!r} in scheme {name!r}."
            f"{_with_its_method(text) or did_you_mean(head, METHODS)} "
            f"Use one of: {', '.join(METHODS)}; as in gptq-int4-g128-sym."
        )
    known = _WEIGHTS_OF_METHOD[head]
    if not rest:
        raise InputError(f"scheme {name!r} names no weight type. Use one of: {', '.join(known)}.")
    weight, *suffixes = rest
    if weight not in known:
        raise InputError(
            f"method {head!r} has no weight type {weight!r} (scheme {name!r}): "
            f"use one of {', '.join(known)}.{did_you_mean(weight, known)}"
        )
    fields = _parse_suffixes(name, suffixes, only_activation=False)
    if weight.startswith("int"):
        if "granularity" not in fields:
            raise InputError(
                f"scheme {name!r} needs a group size, for example {head}-{weight}-g128-sym."
            )
        fields.setdefault("symmetric", True)
    elif "symmetric" in fields:
        raise InputError(f"{weight} has no sym or asym form (scheme {name!r}): drop it.")
    if weight == "fp8":
        fields.setdefault("granularity", "channel")
        if fields["granularity"] == "channel":
            fields["group_size"] = -1
    return Scheme(head, weight, **fields)


def _parse_suffixes(name: str, suffixes: list[str], *, only_activation: bool) -> dict[str, Any]:
    """Parse what follows the weight type into fields of :class:`Scheme`."""
    known = (
        "g128", "gch", "gtensor", "b128", "sym", "asym", "actorder", "dq", "aint8", "afp8",
        "static",
    )  # fmt: skip
    fields: dict[str, Any] = {}
    for suffix in suffixes:
        found: dict[str, Any]
        if suffix == "gch":
            found = {"granularity": "channel", "group_size": -1}
        elif suffix == "gtensor":
            found = {"granularity": "tensor"}
        elif match := re.fullmatch(r"([gb])(\d+)", suffix):
            kind = "group" if match[1] == "g" else "block"
            found = {"granularity": kind, "group_size": int(match[2])}
        elif suffix in ("sym", "asym"):
            found = {"symmetric": suffix == "sym"}
        elif suffix == "actorder":
            found = {"activation_order": True}
        elif suffix == "dq":
            found = {"double_quantization": True}
        elif suffix.startswith("a") and suffix[1:] in ACTIVATIONS:
            found = {"activation": suffix[1:]}
        elif suffix == "static":
            found = {"static_activation": True}
        else:
            raise InputError(
                f"unknown part {suffix!r} in scheme {name!r}.{did_you_mean(suffix, known)} "
                "The form is METHOD-WEIGHT[-gN|-gch][-sym|-asym][-actorder][-aACT[-static]]."
            )
        if only_activation and "activation" not in found:
            head = name.split("-")[0]
            raise InputError(f"{head!r} takes no part {suffix!r} (scheme {name!r}): drop it.")
        if repeated := fields.keys() & found.keys():
            raise InputError(f"scheme {name!r} gives {', '.join(sorted(repeated))} twice.")
        fields.update(found)
    return fields
