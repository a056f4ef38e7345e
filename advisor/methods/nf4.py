"""bitsandbytes' 4-bit types, NF4 and FP4, through its own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight
from advisor.numerics.codebooks import codebook
from advisor.numerics.packing import unpack_nibbles
from advisor.numerics.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import Scheme

BLOCK_SIZE = 64
"""Weights that share a scale where the scheme says nothing, as transformers makes them."""
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""What bitsandbytes' kernels take. transformers' configuration has no field for it, but loaders
take it from every module's own state.
"""


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

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Not used.
        scheme: ``bnb-nf4`` or ``bnb-fp4``, with or without ``-gN`` (blocks of N weights) and
            ``-dq`` (quantized scales).
        settings: Not used: scales are float32 in the checkpoint.

    Returns:
        Codes with ``extras`` as bitsandbytes stores them: ``absmax`` (float32 [blocks], or uint8
        with double quantization), ``quant_map`` (float32 [16]), ``blocksize`` (int64), and with
        double quantization ``nested_absmax`` (float32), ``nested_quant_map`` (float32 [256]),
        ``nested_blocksize`` (int64) and ``offset`` (float32), the last three without dimension
        but the map.

    Raises:
        InputError: The weight cannot be used, or the scheme asks for blocks that do not exist or
            do not divide in_features.

    Reference: QLoRA, arXiv:2305.14314, section 3 (NF4, double quantization).

    Differs from the paper: blocks for the second quantization run over the scales less their mean,
    and both go to the nearest value of a table, as bitsandbytes does.
    """
    from bitsandbytes import functional

    block = block_size(scheme)
    # Its functions for the CPU, so that codes do not depend on where the weight is.
    values = prepare_weight(weight, [scheme]).cpu().contiguous()
    out_features, in_features = values.shape
    packed, state = functional.quantize_4bit(
        values,
        blocksize=block,
        quant_type=scheme.weight,
        compress_statistics=scheme.double_quantization,
    )
    extras = {
        "absmax": state.absmax,
        "quant_map": state.code.to(torch.float32),
        "blocksize": torch.tensor(block),
    }
    absmax = state.absmax
    if scheme.double_quantization:
        extras["nested_absmax"] = state.state2.absmax
        extras["nested_quant_map"] = state.state2.code.to(torch.float32)
        extras["nested_blocksize"] = torch.tensor(state.state2.blocksize)
        extras["offset"] = state.offset.to(torch.float32)
        absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return QuantizedWeight(
        scheme=scheme,
        codes=unpack_nibbles(packed, (out_features, in_features)).contiguous(),
        scales=spread_scales(absmax, block, out_features, in_features),
        codebook=codebook(scheme.weight),
        extras=extras,
    ).to(weight.device)


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
