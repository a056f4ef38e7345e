"""Checkpoints that are published quantized: what is downloaded, and what serving it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.errors import InputError
from advisor.predict.explain import size as in_words
from advisor.predict.memory import Serving, serving_memory
from advisor.predict.size import SizeEstimate, checkpoint_size
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec

_SCHEMES = {"mxfp4": "mxfp4", "fp8": "rtn-fp8-gch-afp8"}
"""Kinds that say by themselves which modules they quantize, and a scheme of the same codes."""


def quantized_notes(
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    *,
    context: int,
    batch: int,
    limit: int | None,
) -> tuple[str, ...]:
    """Say where the checkpoint named is quantized already: advice is for the model it is of.

    Args:
        spec: The model.
        hardware: What would serve it.
        engine: Engine's name, which may or may not read it.
        context: Tokens of a sequence.
        batch: Sequences at once.
        limit: Bytes of a device's memory that may be used, None where that is not known.
    """
    method = published_method(spec)
    if method is None:
        return ()
    takes = ""
    size = published_size(spec)
    if size is not None:
        parts = hardware.count if hardware.kind == "gpu" else 1
        serving = Serving(engine, tensor_parallel=parts, device=hardware.kind)
        memory = serving_memory(spec, size, serving, context, batch).total
        room = (
            ""
            if limit is None
            else ", which is there"
            if memory <= limit
            else ", more than is there"
        )
        each = " of each device" if parts > 1 else ""
        takes = (
            f" It is about {in_words(size.total_bytes)} and takes {in_words(memory)} of "
            f"memory{each}{room}."
        )
    return (
        f"This checkpoint is quantized already ({method}), and can be served as it is where the "
        f"engine reads that.{takes} Everything here is for its weights in 16 bits, which `advisor "
        "tune` needs.",
    )


def published_method(spec: ModelSpec) -> str | None:
    """Return how a checkpoint is quantized already, by its config.json; None where it is not."""
    found = spec.config.get("quantization_config")
    if not isinstance(found, dict) or not found:
        return None
    return str(found.get("quant_method") or "of a kind that config.json does not name")


def published_size(spec: ModelSpec) -> SizeEstimate | None:
    """Return what a quantized checkpoint occupies; None where its kind does not say it.

    MXFP4 is gpt-oss's: of the experts alone, in blocks of 32. FP8 is DeepSeek's: of every linear,
    with a scale a block of 128 x 128.

    Reference: transformers ``quantizers/quantizer_mxfp4.py`` and ``quantizer_finegrained_fp8.py``.
    """
    method = published_method(spec) or ""
    config = spec.config.get("quantization_config", {})
    if method not in _SCHEMES or config.get("weight_block_size", [128, 128]) != [128, 128]:
        return None
    chosen = [linear for linear in spec.linears if linear.is_expert or method == "fp8"]
    scheme = parse_scheme(_SCHEMES[method])
    try:
        return checkpoint_size(spec, {linear.name: scheme for linear in chosen}, method)
    except InputError:
        return None
