"""MXFP4, MXFP8 and NVFP4: small floating point elements with a shared scale per short group."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.methods.input_scales import INPUT_GLOBAL_SCALE, input_global_scale
from advisor.methods.value_feedback import ValueFeedback, least_error
from advisor.numerics.codebooks import decode_e4m3, encode_e4m3
from advisor.numerics.microscaling import (
    E2M1_LARGEST,
    E8M0_BIAS,
    MX_WIDTH,
    NVFP4_WIDTH,
    decode_e8m0,
    e2m1_codebook,
    encode_e2m1,
    global_scale,
    local_scales,
    round_e2m1,
    shared_exponents,
)
from advisor.numerics.quantized_weight import QuantizedWeight, split_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.column_state import Rounding
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

_LARGEST_CODE = 126
"""Of E4M3: 448."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to a micro-scaled type.

    Each group takes, of a few scales that the type can store, the one of least squared error,
    weighted where there are statistics by what the feedback leaves of each. MX blocks try the
    specification's exponent, with which the largest value may saturate, and the next one; with
    ``settings.clip == "mse"`` also the one below. NVFP4 groups have the definition's scale, and
    with ``"mse"`` ranges shrunk down to ``clip_shrink`` too (SmolLM2-135M, 12 linears, nearest
    codes, error of the outputs on other inputs: 0.54 of that without the search).

    With statistics, codes then make up for each other's errors
    (:mod:`advisor.methods.value_feedback`); without, every code is the nearest.

    Args:
        weight: Shape [out, in], any floating type; not modified. Weights that an engine fuses are
            stacked as rows, so that they share NVFP4's global scale.
        statistics: Of the inputs; needed where NVFP4 activations have a global scale. None, or no
            tokens: no feedback.
        scheme: mxfp4, mxfp8 or nvfp4, with or without activations.
        settings: Clip search; for codes ``damping``, ``descent`` and its damping,
            ``output_feedback`` (of a whole G) and its damping. Columns always come in activation
            order.

    Returns:
        Scales [out, in / 32 or in / 16]. NVFP4's ``extras`` hold ``global_scale`` and, with
        activations, ``input_global_scale``, float32 [1]; its ``scales`` are the stored E4M3
        scales divided by the global one.

    Raises:
        InputError: The weight, its number of inputs or the statistics cannot be used.

    Reference: OCP Microscaling Formats (MX) specification 1.0, section 6.3; NVFP4: Pretraining
    large language models with NVFP4, arXiv:2509.25149, appendix C.

    Differs from the MX specification: it has one way to choose the exponent, which as a rule for
    weights costs more than it saves (on the same linears, 1.13 times the error of compressed-
    tensors' rule for MXFP4 and 1.48 times for MXFP8). Decoding is the specification's.
    """
    known = [] if statistics is None else [statistics]
    return _quantize([weight], known, scheme, settings)


def quantize_many(
    weight: Tensor,
    statistics: LayerStatistics | None,
    schemes: Sequence[Scheme],
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize a weight to several micro-scaled types, which share H's factor.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs, or None.
        schemes: Of these types.
        settings: See :func:`quantize`.

    Raises:
        InputError: The weight, its number of inputs or the statistics cannot be used.
    """
    known = [] if statistics is None else [statistics]
    shared = _feedback([weight], known, settings, schemes[0].weight) if schemes else None
    return [_quantize([weight], known, scheme, settings, shared) for scheme in schemes]


def quantize_each(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize linears that share their inputs, and NVFP4's global scale.

    Arguments are :func:`advisor.methods.registry.quantize_each`'s; settings: :func:`quantize`.

    Raises:
        InputError: A weight or the statistics cannot be used.
    """
    found = _quantize(weights, statistics, scheme, settings)
    return list(split_rows(found, [len(weight) for weight in weights]))


def _quantize(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
    shared: ValueFeedback | None = None,
) -> QuantizedWeight:
    """Quantize weights, one below the other."""
    parts = [prepare_weight(weight, []) for weight in weights]
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    width = NVFP4_WIDTH if scheme.weight == "nvfp4" else MX_WIDTH
    out_features, in_features = values.shape
    if in_features % width:
        raise InputError(
            f"{scheme.weight} shares a scale among {width} inputs, which must divide in_features, "
            f"but got in_features={in_features}. Leave such modules 16-bit."
        )
    groups = values.view(out_features, -1, width)
    feedback = shared or _feedback(parts, statistics, settings, scheme.weight)
    importance = None
    if feedback is not None:
        importance = feedback.importance.view(-1, width)
    elif statistics:
        importance = statistics[0].second_moment.diagonal().to(values).view(-1, width)
    extras: dict[str, Tensor] = {}
    rounding: Rounding = _PowersOfTwo()
    if scheme.weight == "nvfp4":
        extras["global_scale"] = global_scale(values.abs().amax())
        if scheme.activation is not None:
            known = next(iter(statistics), None)
            extras[INPUT_GLOBAL_SCALE] = input_global_scale(scheme, known, in_features)
        candidates = _nvfp4_scales(groups, extras["global_scale"], settings)
        rounding = _LocalScales(extras["global_scale"])
    else:
        candidates = _mx_scales(groups, scheme.weight, settings)
    scales = least_error(
        groups, candidates, lambda part: round_elements(part, scheme.weight), importance
    )
    if feedback is not None:
        table = _table(scheme.weight, values.device)
        indices, scales = feedback.improve(values, scales, table, rounding)
        codes = encode_elements(table[indices.long()], scheme.weight)
    else:
        codes = encode_elements(groups / scales.unsqueeze(-1), scheme.weight)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.view(out_features, in_features),
        scales=scales,
        codebook=None if scheme.weight == "mxfp8" else e2m1_codebook(values.device),
        extras=extras,
    )


def _feedback(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    settings: QuantizationSettings,
    method: str,
) -> ValueFeedback | None:
    """Return what codes need to make up for each other's errors, or None without tokens."""
    if not statistics or not statistics[0].tokens:
        return None
    return ValueFeedback(statistics, weights, settings, method)


class _PowersOfTwo:
    """MX's scales."""

    def round_scales(self, scales: Tensor) -> Tensor:
        """Return the nearest powers of two, 2^-127 to 2^127."""
        share, exponents = torch.frexp(scales)
        exponents = exponents - (share < 0.75).to(exponents.dtype)
        return decode_e8m0(exponents.clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS)


class _LocalScales:
    """NVFP4's scales under a global one."""

    def __init__(self, global_: Tensor) -> None:
        self._global = global_

    def round_scales(self, scales: Tensor) -> Tensor:
        """Return the nearest positive E4M3 values over the global scale."""
        return local_scales(scales * E2M1_LARGEST, self._global) / self._global


def _table(weight: str, device: torch.device) -> Tensor:
    """Return the values of a type's elements, rising, zero once, float32."""
    if weight == "mxfp8":
        positive = decode_e4m3(torch.arange(127, dtype=torch.uint8))
    else:
        positive = e2m1_codebook()[:8]
    return torch.cat([-positive[1:].flip(0), positive]).to(device)


def encode_elements(values: Tensor, weight: str) -> Tensor:
    """Return the bit patterns (uint8) of scaled values: E4M3 for mxfp8, else E2M1."""
    return encode_e4m3(values) if weight == "mxfp8" else encode_e2m1(values)


def round_elements(values: Tensor, weight: str) -> Tensor:
    """Return the float32 values that the bit patterns of :func:`encode_elements` stand for."""
    return decode_e4m3(encode_e4m3(values)) if weight == "mxfp8" else round_e2m1(values)


def _mx_scales(groups: Tensor, weight: str, settings: QuantizationSettings) -> list[Tensor]:
    """Return scales to try, the specification's first."""
    exponents = shared_exponents(groups.abs().amax(-1), weight)
    shifts = (0, 1) if _whole_range(settings) else (0, 1, -1)
    return [
        decode_e8m0((exponents + shift).clamp(-E8M0_BIAS, E8M0_BIAS) + E8M0_BIAS)
        for shift in shifts
    ]


def _nvfp4_scales(groups: Tensor, global_: Tensor, settings: QuantizationSettings) -> list[Tensor]:
    """Return scales to try, the definition's first: the values of E4M3 that the ranges come to.

    A clip search has them all between ``clip_shrink`` of the range and the one above it: E4M3
    rounds scales down as often as up. Eight values to the octave are fewer than ``clip_steps``.
    """
    first = encode_e4m3(local_scales(groups.abs().amax(-1), global_)).to(torch.int16)
    shifts = [0]
    if not _whole_range(settings):
        shifts += [1, *range(-1, math.floor(8 * math.log2(settings.clip_shrink)) - 1, -1)]
    codes = ((first + shift).clamp_(1, _LARGEST_CODE).to(torch.uint8) for shift in shifts)
    return [decode_e4m3(code) / global_ for code in codes]


def _whole_range(settings: QuantizationSettings) -> bool:
    """Return whether there is no search."""
    if settings.clip not in ("none", "mse"):
        raise InputError(f"clip must be 'none' or 'mse', but got {settings.clip!r}.")
    return settings.clip == "none"
