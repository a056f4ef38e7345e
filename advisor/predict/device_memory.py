"""How much of a device's memory serving may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.predict.explain import size

if TYPE_CHECKING:
    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile

HEADROOM = 0.08
"""Share of a device's memory that is left free when no ``--max-memory`` is given."""


def memory_limit(budgets: Budgets, hardware: HardwareProfile) -> int | None:
    """Return the limit on device memory: the budget, else what the device has, less 8%.

    A budget above what the device has allows no more than that.
    """
    given, there = budgets.max_memory_bytes, hardware.memory_bytes
    if given is not None:
        return given if there is None else min(given, there)
    return None if there is None else int(there * (1 - HEADROOM))


def beyond_device(budgets: Budgets, hardware: HardwareProfile, needed_bytes: float) -> bool:
    """Return whether no ``--max-memory`` would give so much: the device has less, or none is given.

    A device's own memory is no budget to be raised: another device is.
    """
    there = hardware.memory_bytes
    return budgets.max_memory_bytes is None or (there is not None and needed_bytes > there)


def memory_notes(budgets: Budgets, hardware: HardwareProfile) -> tuple[str, ...]:
    """Say where a budget on memory is more than the device has; nothing where it is not."""
    given, there = budgets.max_memory_bytes, hardware.memory_bytes
    if given is None or there is None or given <= there:
        return ()
    return (
        f"{hardware.name} has {size(there)} of memory{' each' if hardware.count > 1 else ''}, and "
        f"--max-memory asks for {size(given)}: everything here is for what it has.",
    )
