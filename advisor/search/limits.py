"""Size, memory and speed budgets as one number: the largest checkpoint that meets them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.engines.verdict import verdict
from advisor.predict.candidate import memory_limit
from advisor.predict.memory import Serving, serving_memory
from advisor.predict.speed import predict_speed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.size import SizeEstimate
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """The largest checkpoint allowed.

    Attributes:
        max_bytes: Bytes of the weight files; None for no limit.
        budget: Name of the budget that decided, or None.
    """

    max_bytes: int | None
    budget: str | None


def size_limit(
    spec: ModelSpec,
    smallest: SizeEstimate,
    largest: SizeEstimate,
    schemes: Sequence[Scheme],
    hardware: HardwareProfile,
    engine: str,
    budgets: Budgets,
    *,
    context: int,
    batch: int,
) -> SizeLimit:
    """Return what size, memory and speed budgets together leave for the checkpoint.

    Memory of a device is linear in the checkpoint's bytes (of several devices each holds a part;
    an engine that decompresses holds the same whatever the file), and decoding reads every weight
    once, so both are limits on bytes.

    Args:
        spec: The model.
        smallest: Size of its smallest mixture.
        largest: Size of its largest.
        schemes: The engine's options, for the kernel's speed.
        hardware: The device.
        engine: What serves.
        budgets: The user's.
        context: Tokens of a sequence.
        batch: Sequences at once.
    """
    found: list[tuple[int, str]] = []
    if budgets.max_size_bytes is not None:
        found.append((budgets.max_size_bytes, "max_size"))
    least, most = (
        memory_bytes(spec, size, hardware, engine, context=context, batch=batch)
        for size in (smallest, largest)
    )
    available = memory_limit(budgets, hardware)
    if available is not None and least is not None and most is not None:
        span = largest.total_bytes - smallest.total_bytes
        if most > least:
            room = smallest.total_bytes + int((available - least) * span / (most - least))
            found.append((max(1, room), "max_memory"))
        elif least > available:
            found.append((1, "max_memory"))
    if budgets.min_tokens_per_s is not None:
        limit = _speed_limit(
            spec, smallest, schemes, hardware, engine, budgets.min_tokens_per_s, context, batch
        )
        if limit is not None:
            found.append((limit, "min_speed"))
    if not found:
        return SizeLimit(None, None)
    return SizeLimit(*min(found))


def memory_bytes(
    spec: ModelSpec,
    size: SizeEstimate,
    hardware: HardwareProfile,
    engine: str,
    *,
    context: int,
    batch: int,
) -> int | None:
    """Return the peak memory of each device when serving; None where attention is not known."""
    if not spec.attention:
        return None
    devices = hardware.count if hardware.kind == "gpu" else 1
    serving = Serving(engine, tensor_parallel=devices, device=hardware.kind)
    return serving_memory(spec, size, serving, context, batch).total


def _speed_limit(
    spec: ModelSpec,
    smallest: SizeEstimate,
    schemes: Sequence[Scheme],
    hardware: HardwareProfile,
    engine: str,
    tokens_per_s: float,
    context: int,
    batch: int,
) -> int | None:
    """Return the largest checkpoint that decodes fast enough; None where speed is not predicted."""
    quantized = [scheme for scheme in schemes if scheme.is_quantized]
    if not quantized:
        return None
    scheme = min(quantized, key=lambda option: option.bits)
    kernel = verdict(engine, scheme, hardware, spec.linears)

    def speed(linear_bytes: int) -> float | None:
        estimate = predict_speed(
            spec, scheme, kernel, hardware, engine,
            linear_bytes=linear_bytes, context=context, batch=batch,
        )  # fmt: skip
        return None if estimate.decode is None else estimate.decode.expected

    beside = smallest.total_bytes - smallest.quantizable_bytes
    low, high = 1, 2 * spec.quantizable_parameters
    fastest = speed(low)
    if fastest is None:
        return None
    if fastest < tokens_per_s:
        return beside
    while high - low > 4096:
        middle = (low + high) // 2
        reached = speed(middle)
        if reached is not None and reached >= tokens_per_s:
            low = middle
        else:
            high = middle
    return beside + low
