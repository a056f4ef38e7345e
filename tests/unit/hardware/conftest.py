"""A fake pynvml that answers from records, and fails where a test says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MIB = 2**20
NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, UNKNOWN = 3, 4, 6, 999


class NVMLError(Exception):
    """Like pynvml's: the code in ``value``, the driver's words in ``str``."""

    def __init__(self, value: int) -> None:
        self.value = value
        super().__init__(value)

    def __str__(self) -> str:
        words = {3: "Not Supported", 4: "Insufficient Permissions", 6: "Not Found"}
        return words.get(self.value, "Unknown Error")


@dataclass
class Card:
    """What one GPU answers; memory None: NVML does not support the question (unified memory)."""

    name: str | bytes
    capability: tuple[int, int]
    memory_mib: int | None
    sm_clock: int = 1410
    memory_clock: int = 1215
    power_mw: int = 300_000
    mig: tuple[int, int] | None = None
    instances: list[tuple[str, int, int, int]] = field(default_factory=list)
    """Name, memory in MiB, compute slices, multiprocessors."""


# As nvidia-smi prints them on such machines.
RECORDS: dict[str, Card] = {
    "p100": Card("Tesla P100-PCIE-16GB", (6, 0), 16384, 1328, 715, 250_000),
    "p40": Card("Tesla P40", (6, 1), 22919, 1531, 3615, 250_000),
    "v100": Card("Tesla V100-SXM2-32GB", (7, 0), 32510, 1530, 877, 300_000),
    "t4": Card("Tesla T4", (7, 5), 15360, 1590, 5001, 70_000),
    "a100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 81920, 1410, 1593, 400_000, mig=(0, 0)),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 24576, 2100, 9751, 350_000),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 24564, 3105, 10501, 450_000),
    "h100": Card("NVIDIA H100 80GB HBM3", (9, 0), 81559, 1980, 2619, 700_000, mig=(0, 0)),
    "b200": Card("NVIDIA B200", (10, 0), 183359, 1965, 3996, 1_000_000, mig=(0, 0)),
    "b300": Card("NVIDIA B300 SXM6 AC", (10, 3), 275040, 2032, 3996, 1_100_000, mig=(0, 0)),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 32607, 3090, 14001, 575_000),
    "gb10": Card("NVIDIA GB10", (12, 1), None, 3003, 0, 0),
    "mig": Card(
        "NVIDIA A100-SXM4-40GB", (8, 0), 40960, 1410, 1215, 400_000, mig=(1, 1),
        instances=[
            ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", 19968, 3, 42),
            ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", 4864, 1, 14),
        ],
    ),
}  # fmt: skip


class FakeNvml:
    """The functions of pynvml that detection calls."""

    NVMLError = NVMLError
    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2

    def __init__(
        self, cards: list[Card], errors: dict[str, int], driver: str | bytes = "570.124.06"
    ) -> None:
        self.cards = cards
        self.errors = errors
        self.driver = driver
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("nvml"):
            self.calls.append(name)
            code = self.errors.get(name)
            if code is not None:

                def fail(*_: object) -> None:
                    raise NVMLError(code)

                return fail
        return value

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> str | bytes:
        return self.driver

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self.cards[index]

    def nvmlDeviceGetName(self, handle: Any) -> str | bytes:
        return handle.name

    def nvmlDeviceGetCudaComputeCapability(self, handle: Card) -> tuple[int, int]:
        return handle.capability

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        if handle.memory_mib is None:
            raise NVMLError(NOT_SUPPORTED)
        total = handle.memory_mib * MIB
        return SimpleNamespace(total=total, free=total - 500 * MIB, used=500 * MIB)

    def nvmlDeviceGetMaxClockInfo(self, handle: Card, kind: int) -> int:
        return handle.sm_clock if kind == self.NVML_CLOCK_SM else handle.memory_clock

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Card) -> int:
        return handle.power_mw

    def nvmlDeviceGetMigMode(self, handle: Card) -> tuple[int, int]:
        if handle.mig is None:
            raise NVMLError(NOT_SUPPORTED)
        return handle.mig

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Card, index: int) -> Any:
        if index >= len(handle.instances):
            raise NVMLError(NOT_FOUND)
        name, memory, slices, processors = handle.instances[index]
        return SimpleNamespace(name=name, memory_mib=memory, slices=slices, processors=processors)

    def nvmlDeviceGetAttributes(self, handle: Any) -> Any:
        return SimpleNamespace(
            computeInstanceSliceCount=handle.slices, multiprocessorCount=handle.processors
        )


@pytest.fixture
def nvml() -> Callable[..., FakeNvml]:
    """Make a fake pynvml: names of records or cards, and function names with error codes."""

    def make(*cards: str | Card, driver: str | bytes = "570.124.06", **errors: int) -> FakeNvml:
        chosen = [RECORDS[card] if isinstance(card, str) else card for card in cards]
        return FakeNvml(chosen, errors, driver)

    return make


@pytest.fixture
def card() -> type[Card]:
    """The class of a record, for cards of a test's own."""
    return Card


@pytest.fixture
def linux(tmp_path: Path) -> Callable[..., Path]:
    """Make a root folder with /proc and /sys files: path to text."""

    def make(**files: str) -> Path:
        for name, text in files.items():
            path = tmp_path / "root" / name.replace("__", "/").replace("_DOT_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return tmp_path / "root"

    return make


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ADVISOR_PROFILES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
