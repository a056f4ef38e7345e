"""bitsandbytes' 4-bit types, NF4 and FP4: by its own functions, or fitted to second moments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.methods.value_feedback import FixedScales, ValueFeedback, least_error
from advisor.numerics.codebooks import codebook
from advisor.numerics.nearest import Nearest
from advisor.numerics.packing import unpack_nibbles
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

BLOCK_SIZE = 64
"""Weights that share a scale where the scheme says nothing, as transformers makes them."""
NESTED_BLOCK_SIZE = 256
"""Scales that share one of their own under double quantization."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' kernels take. transformers' configuration has no field for it, but loaders
take it from every module's own state.
"""


_SMALLEST_SCALE = 1e-12
"""Of a block of zeros, and in place of a double-quantized scale of zero: codes divide by it."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to NF4 or FP4 in blocks of the flattened weight, of 64 unless told so.

    ``dequantize()`` equals bitsandbytes' own, bit for bit. Where the usual block does not divide
    in_features it goes on in the next row; ``scales`` then has a column for every input. A block
    size that the scheme names has to divide: bitsandbytes 0.50.2 reads others wrongly on a CPU.

    With statistics, and blocks that lie within rows, codes and scales make up for each other's
    errors (:mod:`advisor.methods.value_feedback`): loaders take scales and codes as they are
    stored. Double-quantized scales are rounded first, and codes chosen for them as read back.
    Without statistics, or with blocks that straddle rows, codes and scales are bitsandbytes' own.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs; None, or no tokens: no feedback.
        scheme: ``bnb-nf4`` or ``bnb-fp4``, with or without ``-gN`` (blocks of N weights) and
            ``-dq`` (quantized scales).
        settings: For codes with feedback: clip search, ``damping``, ``descent`` and its damping,
            ``output_feedback`` (of a whole G) and its damping. Scales are float32 in the
            checkpoint, whatever ``scale_dtype``.

    Returns:
        Codes with ``extras`` as bitsandbytes stores them: ``absmax`` (float32 [blocks], or uint8
        with double quantization), ``quant_map`` (float32 [16]), ``blocksize`` (int64), and with
        double quantization ``nested_absmax`` (float32), ``nested_quant_map`` (float32 [256]),
        ``nested_blocksize`` (int64) and ``offset`` (float32), the last three without dimension
        but the map.

    Raises:
        InputError: The weight or the statistics cannot be used, or the scheme asks for blocks that
            do not exist or do not divide in_features.

    Reference: QLoRA, arXiv:2305.14314, section 3 (NF4, double quantization).

    Differs from the paper: blocks for the second quantization run over the scales less their mean,
    and both go to the nearest value of a table, as bitsandbytes does; with statistics, a scale need
    not be the largest weight of its block.
    """
    known = [] if statistics is None else [statistics]
    return quantize_each([weight], known, scheme, settings)[0]


def quantize_each(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize linears that share their inputs, each with feedback among its own outputs.

    Arguments are :func:`advisor.methods.registry.quantize_each`'s; settings: :func:`quantize`.

    Raises:
        InputError: A weight, the statistics or the scheme cannot be used.
    """
    block = block_size(scheme)
    parts = [prepare_weight(weight, [scheme]) for weight in weights]
    in_features = parts[0].shape[1]
    if not statistics or not statistics[0].tokens or in_features % block:
        return [_rounded(part, scheme) for part in parts]
    feedback = ValueFeedback(statistics, parts, settings, "bnb")
    values, device = torch.cat(parts), parts[0].device
    table, patterns = (part.to(device) for part in _table(scheme.weight))
    groups = values.view(len(values), -1, block)
    scales = _scales(groups, table, feedback.importance.view(-1, block), settings)
    indices, scales = feedback.improve(values, scales, table, _AnyScales())
    heights = [len(part) for part in parts]
    stored = [_stored_scales(own.flatten(), scheme) for own in torch.split(scales, heights)]
    if scheme.double_quantization:
        read = torch.cat([absmax.to(device).view(-1, len(groups[0])) for absmax, _ in stored])
        read = torch.where(read == 0, torch.full_like(read, _SMALLEST_SCALE), read)
        indices, _ = feedback.improve(values, read, table, FixedScales())
    codes = patterns[indices.long()]
    return [
        _assemble(own, *fields, scheme, block).to(device)
        for own, fields in zip(torch.split(codes, heights), stored, strict=True)
    ]


def _rounded(values: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Quantize float32 values as bitsandbytes does."""
    from bitsandbytes import functional

    # Its functions for the CPU, so that codes do not depend on where the weight is.
    block = block_size(scheme)
    packed, state = functional.quantize_4bit(
        values.cpu().contiguous(), blocksize=block, quant_type=scheme.weight
    )
    absmax, extras = _stored_scales(state.absmax, scheme)
    shape = (values.shape[0], values.shape[1])
    codes = unpack_nibbles(packed, shape).contiguous()
    return _assemble(codes, absmax, extras, scheme, block).to(values.device)


def _stored_scales(absmax: Tensor, scheme: Scheme) -> tuple[Tensor, dict[str, Tensor]]:
    """Return scales, float32 [blocks], as they are read back, and what is stored of them."""
    from bitsandbytes import functional

    absmax = absmax.cpu().contiguous()
    if not scheme.double_quantization:
        return absmax, {"absmax": absmax}
    offset = absmax.mean()
    stored, nested = functional.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)
    read = functional.dequantize_blockwise(stored, nested) + offset
    return read, {
        "absmax": stored,
        "nested_absmax": nested.absmax,
        "nested_quant_map": nested.code.to(torch.float32),
        "nested_blocksize": torch.tensor(nested.blocksize),
        "offset": offset.to(torch.float32),
    }


def _assemble(
    codes: Tensor, absmax: Tensor, extras: Mapping[str, Tensor], scheme: Scheme, block: int
) -> QuantizedWeight:
    """Return the weight of codes [out, in] and scales [blocks]."""
    from bitsandbytes import functional

    return QuantizedWeight(
        scheme=scheme,
        codes=codes.cpu().contiguous(),
        scales=spread_scales(absmax, block, codes.shape[0], codes.shape[1]),
        codebook=codebook(scheme.weight),
        extras={
            **extras,
            "quant_map": functional.get_4bit_type(scheme.weight, device="cpu").to(torch.float32),
            "blocksize": torch.tensor(block),
        },
    )


class _AnyScales:
    """Scales in float32."""

    def round_scales(self, scales: Tensor) -> Tensor:
        """Return them as they are."""
        return scales


def _table(weight: str) -> tuple[Tensor, Tensor]:
    """Return the values of a type, rising, zero once, and their bit patterns (uint8)."""
    values = codebook(weight)
    patterns = torch.argsort(values, stable=True)
    kept = torch.cat([values[patterns].diff() > 0, torch.tensor([True])])
    patterns = patterns[kept]
    return values[patterns], patterns.to(torch.uint8)


def _scales(
    groups: Tensor, table: Tensor, importance: Tensor, settings: QuantizationSettings
) -> Tensor:
    """Return a scale for each block of weights [out, blocks, block] to start from."""
    if settings.clip not in ("none", "mse"):
        raise InputError(f"clip must be 'none' or 'mse', but got {settings.clip!r}.")
    absmax = groups.abs().amax(-1).clamp_min(_SMALLEST_SCALE)
    shares = [1.0]
    if settings.clip == "mse":
        shares = torch.linspace(1.0, settings.clip_shrink, settings.clip_steps).tolist()
    return least_error(
        groups,
        [absmax * share for share in shares],
        Nearest(table).values,
        importance,
    )


def block_size(scheme: Scheme) -> int:
    """Return the number of weights that share a scale.

    Raises:
        InputError: bitsandbytes has no such blocks.
    """
    size = scheme.group_size if scheme.granularity == "group" else BLOCK_SIZE
    if scheme.granularity not in ("none", "group") or size not in BLOCK_SIZES:
        plain = f"bnb-{scheme.weight}{'-dq' if scheme.double_quantization else ''}"
        raise InputError(
            f"bitsandbytes stores blocks of {', '.join(map(str, BLOCK_SIZES))} weights, "
            f"but got scheme {scheme}: use {plain}, which has blocks of {BLOCK_SIZE}."
        )
    return int(size)


def spread_scales(absmax: Tensor, block: int, out_features: int, in_features: int) -> Tensor:
    """Return the scales of blocks as [out, groups], also where a block spans rows.

    Args:
        absmax: float32 [blocks], one per ``block`` weights of the flattened weight.
        block: Weights that share a scale.
        out_features: Rows of the weight.
        in_features: Columns of the weight.

    Returns:
        float32 [out, in / block], or [out, in] where the block does not divide in_features.
    """
    if in_features % block == 0:
        return absmax.view(out_features, -1)
    spread = absmax.repeat_interleave(block)
    return spread[: out_features * in_features].view(out_features, in_features)
