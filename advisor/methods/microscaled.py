"""MXFP4, MXFP8 and NVFP4: small floating point elements with a shared scale per short group."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight, require_statistics
from advisor.numerics.codebooks import decode_e4m3, encode_e4m3
from advisor.numerics.microscaling import (
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
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Round a weight to a micro-scaled type.

    Each group takes, of a few scales that the type can store, the one of least squared error,
    weighted by H's diagonal where there are statistics. MX blocks try the specification's exponent,
    with which the largest value may saturate, and the next one; with ``settings.clip == "mse"``
    also the one below. NVFP4 groups have the definition's scale, and with ``"mse"`` ranges shrunk
    down to ``clip_shrink`` too (SmolLM2-135M, 12 linears, error of the outputs on other inputs:
    0.54 of that without the search).

    Args:
        weight: Shape [out, in], any floating type; not modified. Weights that an engine fuses are
            stacked as rows, so that they share NVFP4's global scale.
        statistics: Of the inputs; needed where NVFP4 activations have a global scale.
        scheme: mxfp4, mxfp8 or nvfp4, with or without activations.
        settings: Clip search.

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
    values = prepare_weight(weight, [])
    width = NVFP4_WIDTH if scheme.weight == "nvfp4" else MX_WIDTH
    out_features, in_features = values.shape
    if in_features % width:
        raise InputError(
            f"{scheme.weight} shares a scale among {width} inputs, which must divide in_features, "
            f"but got in_features={in_features}. Leave such modules 16-bit."
        )
    groups = values.view(out_features, -1, width)
    importance = None
    if statistics is not None:
        importance = statistics.second_moment.diagonal().to(values).view(-1, width)
    extras: dict[str, Tensor] = {}
    if scheme.weight == "nvfp4":
        extras["global_scale"] = global_scale(values.abs().amax())
        if scheme.activation is not None:
            found = require_statistics(statistics, in_features, f"{scheme}'s input scale")
            extras["input_global_scale"] = global_scale(found.absolute_maximum.amax()).cpu()
        candidates = _nvfp4_scales(groups, extras["global_scale"], settings)
    else:
        candidates = _mx_scales(groups, scheme.weight, settings)
    scales = _least_error(groups, candidates, scheme.weight, importance)
    codes = encode_elements(groups / scales.unsqueeze(-1), scheme.weight)
    return QuantizedWeight(
        scheme=scheme,
        codes=codes.view(out_features, in_features),
        scales=scales,
        codebook=None if scheme.weight == "mxfp8" else e2m1_codebook(values.device),
        extras=extras,
    )


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
    """Return scales to try, the definition's first."""
    maxima = groups.abs().amax(-1)
    shares = [1.0]
    if not _whole_range(settings):
        # Ranges a little larger too: E4M3 rounds scales down as often as up.
        shares = [1.0, 1.06, 1.125]
        shares += torch.linspace(1.0, settings.clip_shrink, settings.clip_steps).tolist()[1:]
    return [local_scales(maxima * share, global_) / global_ for share in shares]


def _whole_range(settings: QuantizationSettings) -> bool:
    """Return whether there is no search."""
    if settings.clip not in ("none", "mse"):
        raise InputError(f"clip must be 'none' or 'mse', but got {settings.clip!r}.")
    return settings.clip == "none"


def _least_error(
    groups: Tensor, candidates: list[Tensor], weight: str, importance: Tensor | None
) -> Tensor:
    """Return, per group, the first scale of least (weighted) squared error."""
    best = candidates[0]
    if len(candidates) == 1:
        return best
    least: Tensor | None = None
    for scales in candidates:
        spread = scales.unsqueeze(-1)
        error = round_elements(groups / spread, weight).mul_(spread).sub_(groups).square_()
        found = (error if importance is None else error.mul_(importance)).sum(-1)
        if least is None:
            least = found
            continue
        better = found < least
        least, best = torch.where(better, found, least), torch.where(better, scales, best)
    return best
