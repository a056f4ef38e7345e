"""GGUF's block types and k-quants, fitted to second moments of the inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from advisor.errors import InputError
from advisor.methods.checks import prepare_weight, refuse_lost
from advisor.methods.gguf_feedback import BlockFeedback
from advisor.methods.gguf_fields import fit_rows
from advisor.methods.gguf_state import SMALLEST_FACTOR, BlockState
from advisor.numerics.gguf_blocks import code_values, get_block_type
from advisor.numerics.quantized_weight import QuantizedWeight, split_rows
from advisor.predict.gguf_types import base_type, stored_type
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.calibration.statistics import LayerStatistics
    from advisor.methods.settings import QuantizationSettings

_CHUNK_WEIGHTS = 1 << 22
"""Weights fitted at once, so that the search's copies stay small."""
_FEEDBACK_WEIGHTS = 1 << 21
"""Weights whose codes are chosen at once, in each of the types: cut by the weight alone."""
_SMALLEST_IMPORTANCE = 1e-4
"""Of an input, relative to the mean: an input that calibration never saw still has a weight."""


def quantize(
    weight: Tensor,
    statistics: LayerStatistics | None,
    scheme: Scheme,
    settings: QuantizationSettings,
) -> QuantizedWeight:
    """Quantize a weight to a GGUF block type, or to the main type of a file type.

    See :func:`quantize_many`.
    """
    return quantize_many(weight, statistics, [scheme], settings)[0]


def quantize_many(
    weight: Tensor,
    statistics: LayerStatistics | None,
    schemes: Sequence[Scheme],
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize one weight to many GGUF block types with one Cholesky factor and one column loop.

    Every group's scale and minimum are a weighted least-squares fit, the weights being the second
    moment of each input; then the scales of a super-block are rounded, and refitted as a whole.
    With statistics, codes then make up for each other's errors, and codes and fields are improved
    in turn (:mod:`advisor.methods.gguf_feedback`); without, every code is the nearest.

    Args:
        weight: Shape [out, in], any floating type; not modified.
        statistics: Of the inputs; None, or no tokens: all inputs alike, and no feedback.
        schemes: ``gguf-TYPE``. Rows that do not fill a block take llama.cpp's fallback type.
        settings: ``damping``, ``descent`` and its damping, ``output_feedback`` (of a whole G) and
            its damping. Scales are float16 in the file, whatever ``scale_dtype``; columns always
            come in activation order.

    Returns:
        Codes whose scheme names the type that is really stored, with the block's fields ``d``,
        ``dmin``, ``s`` and ``m`` in ``extras`` (see :func:`pack_blocks`).

    Raises:
        InputError: The weight, the statistics or a setting cannot be used, no type fits the
            weight's rows, or its factors leave float16's range.

    Reference: llama.cpp, ggml-quants.c (``make_qx_quants``, ``make_qkx3_quants``) and its
    importance matrix; GPTQ, arXiv:2210.17323.

    Differs from llama.cpp: the importance is the second moment alone, without the factor
    sqrt(sigma² + w²); more scales are tried; and after the scales of a super-block are rounded,
    every group's neighbouring scales are tried with the minimum fitted to each, and the factors are
    refitted. Error of the outputs over llama.cpp's own, from the same importance, on inputs that
    neither saw (SmolLM2-135M, 12 linears, geometric means), before any feedback: 0.60 to 0.99 for
    Q4_0 to Q8_0 and IQ4_NL, 0.81 to 0.97 for the k-quants.
    """
    values = prepare_weight(weight, schemes)
    feedback: BlockFeedback | None = None
    if statistics is not None and statistics.tokens:
        feedback = BlockFeedback([statistics], [values], settings, "gguf")
    return _quantize(values, statistics, schemes, feedback)


def quantize_each(
    weights: Sequence[Tensor],
    statistics: Sequence[LayerStatistics],
    scheme: Scheme,
    settings: QuantizationSettings,
) -> list[QuantizedWeight]:
    """Quantize linears that share their inputs, each with feedback among its own outputs.

    Arguments are :func:`advisor.methods.registry.quantize_each`'s; settings: :func:`quantize_many`.

    Raises:
        InputError: A weight, the statistics, a setting or the scheme cannot be used.
    """
    values = [prepare_weight(weight, [scheme]) for weight in weights]
    feedback = BlockFeedback(statistics, values, settings, "gguf")
    if not feedback.couples:  # one keeps G's diagonal alone, or none
        pairs = zip(weights, statistics, strict=True)
        return [quantize(weight, own, scheme, settings) for weight, own in pairs]
    (found,) = _quantize(torch.cat(values), statistics[0], [scheme], feedback)
    return list(split_rows(found, [len(weight) for weight in weights]))


def _quantize(
    values: Tensor,
    statistics: LayerStatistics | None,
    schemes: Sequence[Scheme],
    feedback: BlockFeedback | None,
) -> list[QuantizedWeight]:
    """Fit the fields of each type, and improve upon them with feedback, some rows at a time."""
    importance = None if statistics is None else statistics.second_moment.diagonal()
    rows = max(1, _FEEDBACK_WEIGHTS // values.shape[1])
    if feedback is not None and feedback.couples:
        rows = len(values)
    kinds: dict[str, list[tuple[Tensor, dict[str, Tensor]]]] = {}
    for part in torch.split(values, rows):
        rounded = [quantize_blocks(part, scheme, importance) for scheme in dict.fromkeys(schemes)]
        fits = {found.scheme.weight: (found.codes, dict(found.extras)) for found in rounded}
        if feedback is not None:
            states = {name: BlockState.of(name, *fit) for name, fit in fits.items()}
            feedback.improve(part, list(states.values()))
            fits = {name: (own.stored_codes(), own.fields()) for name, own in states.items()}
        for name, fit in fits.items():
            kinds.setdefault(name, []).append(fit)
    done = {name: assemble(Scheme("gguf", name), *_joined(fits)) for name, fits in kinds.items()}
    return [done[stored_type(base_type(s.weight), values.shape[1])] for s in schemes]


def quantize_blocks(
    values: Tensor, scheme: Scheme, importance: Tensor | None = None
) -> QuantizedWeight:
    """Quantize float32 values [out, in]; see :func:`quantize`.

    Args:
        values: Not modified.
        scheme: ``gguf-TYPE``.
        importance: Weight of each input's squared error, float32 [in], not negative; or None.
    """
    out_features, in_features = values.shape
    name = stored_type(base_type(scheme.weight), in_features)
    if name == "f16":
        raise InputError(
            f"GGUF blocks hold 32 weights of a row, but in_features={in_features} is no multiple. "
            "Keep this module in 16 bits."
        )
    kind = get_block_type(name)
    spread = torch.ones(in_features) if importance is None else importance.detach().float()
    spread = spread.to(values.device).clamp_min(_SMALLEST_IMPORTANCE * float(spread.mean()) + 1e-30)
    spread = spread / spread.mean()
    rows = max(1, _CHUNK_WEIGHTS // in_features)
    fits = [
        fit_rows(values[start : start + rows], spread, name, kind)
        for start in range(0, out_features, rows)
    ]
    codes, fields = _joined(fits)
    found = assemble(Scheme("gguf", name), codes, fields)
    small = f"{name} stores factors in float16, the smallest of which is {SMALLEST_FACTOR:.1e}"
    refuse_lost(values, found.dequantize, small, "Keep this module in 16 bits.")
    return found


def assemble(scheme: Scheme, codes: Tensor, fields: dict[str, Tensor]) -> QuantizedWeight:
    """Return the weight that a block's codes and fields stand for.

    Args:
        scheme: ``gguf-TYPE``, TYPE a block type.
        codes: uint8 [out, in].
        fields: As :func:`advisor.numerics.gguf_blocks.unpack_blocks` returns them.
    """
    kind = get_block_type(scheme.weight)
    groups = kind.weights // kind.width
    scales = fields["d"].repeat_interleave(groups, 1)
    extras = dict(fields)
    if kind.scale_levels:
        scales = scales * fields["s"]
    if kind.has_minimum:
        minimums = fields["dmin"].repeat_interleave(groups, 1)
        extras["minimums"] = minimums * fields["m"] if kind.scale_levels else -minimums
    return QuantizedWeight(
        scheme=scheme,
        codes=codes,
        scales=scales,
        codebook=code_values(scheme.weight).to(codes.device),
        extras=extras,
    )


def _joined(fits: list[tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
    codes = torch.cat([codes for codes, _ in fits])
    return codes, {name: torch.cat([fields[name] for _, fields in fits]) for name in fits[0][1]}
