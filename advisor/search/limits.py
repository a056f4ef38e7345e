"""Size, memory and speed budgets as one number: the largest checkpoint that meets them all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from advisor.engines.verdict import Verdict, verdict
from advisor.predict.device_memory import memory_limit
from advisor.predict.memory import Serving, serving_memory
from advisor.predict.speed import predict_speed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.size import SizeEstimate
    from advisor.schemes import Scheme


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """The largest checkpoint that one budget allows.

    Attributes:
        budget: ``max_size``, ``max_memory`` or ``min_speed``.
        given: The budget; a device's own memory where none was given.
        max_bytes: Bytes of the weight files.
        needed: What the budget would have to be for a checkpoint of so many bytes; None where it
            cannot be predicted.
        assumed: Whether it is what the device has, and no budget.
        most: What the budget can be at most: what the device has; None where anything goes.
    """

    budget: str
    given: float
    max_bytes: int
    needed: Callable[[int], float | None]
    assumed: bool = False
    most: float | None = None


def size_limits(
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
) -> tuple[SizeLimit, ...]:
    """Return what each budget on size, memory and speed leaves for the checkpoint, least first.

    Memory of a device is linear in the checkpoint's bytes (of several devices each holds a part;
    an engine that decompresses holds the same whatever the file), and decoding reads every weight
    once, so both are limits on bytes; what arithmetic takes, the fastest kernel's here, is a limit
    of its own (:mod:`advisor.search.pace`).

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
    found: list[SizeLimit | None] = []
    if (size := budgets.max_size_bytes) is not None:
        found.append(SizeLimit("max_size", size, size, float))
    least, most = (
        memory_bytes(spec, size, hardware, engine, context=context, batch=batch)
        for size in (smallest, largest)
    )
    available = memory_limit(budgets, hardware)
    if available is not None and least is not None and most is not None:
        found.append(
            _memory_limit(
                available, (smallest.total_bytes, least), (largest.total_bytes, most),
                assumed=budgets.max_memory_bytes is None, most=hardware.memory_bytes,
            )
        )  # fmt: skip
    if budgets.min_tokens_per_s is not None:
        found.append(
            _speed_limit(
                spec, smallest, schemes, hardware, engine, budgets.min_tokens_per_s, context, batch
            )
        )
    return tuple(sorted((x for x in found if x is not None), key=lambda x: x.max_bytes))


def _memory_limit(
    available: int,
    smallest: tuple[int, int],
    largest: tuple[int, int],
    *,
    assumed: bool,
    most: float | None,
) -> SizeLimit | None:
    """Return the limit of memory, from two pairs of bytes of the file and of memory."""
    (size, least), (end, greatest) = smallest, largest
    per_byte = (greatest - least) / max(1, end - size)
    if per_byte <= 0:  # decompressed: whatever the file, the memory is the same
        if least <= available:
            return None
        return SizeLimit("max_memory", available, 1, lambda _: least, assumed, most)
    room = size + int((available - least) / per_byte)
    return SizeLimit(
        "max_memory", available, max(1, room), lambda n: least + per_byte * (n - size), assumed,
        most,
    )  # fmt: skip


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
) -> SizeLimit | None:
    """Return the largest checkpoint that decodes fast enough; None where speed is not predicted."""
    quantized = [scheme for scheme in schemes if scheme.is_quantized]
    if not quantized:
        return None
    beside = smallest.total_bytes - smallest.quantizable_bytes
    low, high = beside + 1, beside + 2 * spec.quantizable_parameters

    @cache
    def kernel_of(scheme: Scheme) -> Verdict:
        return verdict(engine, scheme, hardware, spec.linears)

    def speed_of(scheme: Scheme, size_bytes: int) -> float | None:
        estimate = predict_speed(
            spec, scheme, kernel_of(scheme), hardware, engine,
            linear_bytes=max(1, size_bytes - beside), context=context, batch=batch,
        )  # fmt: skip
        return None if estimate.decode is None else estimate.decode.expected

    speeds = {scheme: speed_of(scheme, low) or 0.0 for scheme in quantized}
    scheme = min(quantized, key=lambda option: option.bits)
    if speeds[scheme] < tokens_per_s:  # it waits for arithmetic, or fits not all modules
        scheme = max(quantized, key=lambda option: speeds[option])
    speed = partial(speed_of, scheme)
    fastest = speed(low)
    if fastest is None:
        return None
    if fastest < tokens_per_s:
        return SizeLimit("min_speed", tokens_per_s, beside, speed)
    while high - low > 4096:
        middle = (low + high) // 2
        reached = speed(middle)
        if reached is not None and reached >= tokens_per_s:
            low = middle
        else:
            high = middle
    return SizeLimit("min_speed", tokens_per_s, low, speed)
