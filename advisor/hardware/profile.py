"""What is known of a GPU or a CPU: figures with their sources, and what follows from them."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from advisor.hardware.capabilities import Capabilities, derive_capabilities
from advisor.plan.schema import Hardware, Strict

Grade = Literal[
    "datasheet",
    "whitepaper",
    "brochure",
    "specification",
    "datasheet-copy",
    "whitepaper-copy",
    "database",
    "configuration",
    "derived",
    "community",
    "reported",
    "measured",
    "user",
]
"""How a figure is known. The vendor's own papers come first; ``*-copy`` is a reprint of one;
``derived`` is arithmetic that the source states; ``reported`` is what a driver says."""

WITH_SPARSITY = re.compile(r"\bwith (structured )?sparsity\b", re.IGNORECASE)


class Figure(Strict):
    """One number, and why to believe it."""

    value: float = Field(gt=0, allow_inf_nan=False)
    grade: Grade
    source: str = Field(min_length=1)

    @field_validator("source")
    @classmethod
    def _dense_only(cls, value: str) -> str:
        if WITH_SPARSITY.search(value):
            raise ValueError("rates must be dense, half of those with sparsity")
        return value


class Figures(Strict):
    """The figures of one device; dense rates only; an absent one is not known.

    Rates are peaks: 10^12 operations per second, a multiply-add counted as two. The ``fp16``,
    ``bf16`` and ``fp8`` rates accumulate in FP32.
    """

    memory_gib: Figure | None = None
    """Nominal capacity (2^30 bytes), as in the product's name."""
    usable_memory_gib: Figure | None = None
    """What the driver or operating system leaves of it, where that is known."""
    bandwidth_gb_s: Figure | None = None
    """Memory bandwidth, 10^9 bytes per second."""
    fp32_tflops: Figure | None = None
    """Plain FP32, no TF32."""
    fp16_tflops: Figure | None = None
    bf16_tflops: Figure | None = None
    int8_tops: Figure | None = None
    int4_tops: Figure | None = None
    """INT4 by INT4. No serving engine has such a path: it says nothing of 4-bit weights."""
    fp8_tflops: Figure | None = None
    fp4_tflops: Figure | None = None
    fp16_accumulate_tflops: Figure | None = None
    """FP16 that accumulates in FP16: the headline rate of GeForce cards."""
    tdp_w: Figure | None = None


FIGURE_NAMES: tuple[str, ...] = tuple(Figures.model_fields)


class HardwareProfile(Strict):
    """A GPU or CPU model, ``count`` times.

    Every figure is of one device. What is not known is None, and :attr:`unknown` lists it.
    """

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    name: str = Field(min_length=1)
    vendor: str = Field(min_length=1)
    kind: Literal["gpu", "cpu"]
    architecture: str | None = None
    compute_capability: str | None = Field(default=None, pattern=r"^\d{1,2}\.\d$")
    """NVIDIA only, as ``8.9``; see :attr:`sm`."""
    isa: str | None = None
    """Compilation target of a GPU that is not NVIDIA's, as ``gfx942``."""
    instruction_sets: tuple[str, ...] = ()
    """CPUs: names as Linux prints them, as ``avx2`` or ``avx512_vnni``."""
    aliases: tuple[str, ...] = ()
    """Other full names of this very device."""
    shared_names: tuple[str, ...] = ()
    """Names that fit this device and others: typed alone, they are asked about."""
    other_variants: tuple[str, ...] = ()
    """Devices of the same name that are no profile, as ``RTX 3060 8GB``."""
    devices_per_card: int = Field(default=1, ge=1)
    """Devices that one card shows: a process without tensor parallelism has one of them. The
    figures are of the whole card."""
    figures: Figures = Field(default_factory=Figures)
    notes: tuple[str, ...] = ()
    count: int = Field(default=1, ge=1, le=4096)

    @field_validator("compute_capability", mode="before")
    @classmethod
    def _refuse_number(cls, value: object) -> object:
        # An unquoted 12.0 stays right in YAML, but 8.10 would turn into 8.1.
        if isinstance(value, float):
            raise ValueError(f"compute_capability must be quoted: '{value}'")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> HardwareProfile:
        if self.vendor == "NVIDIA" and self.kind == "gpu" and self.isa is not None:
            raise ValueError("an NVIDIA GPU has a compute_capability, no isa")
        if self.vendor != "NVIDIA" and self.compute_capability is not None:
            raise ValueError(f"compute_capability is NVIDIA's; a GPU of {self.vendor} has an isa")
        if self.kind == "gpu" and self.instruction_sets:
            raise ValueError("instruction_sets belong to CPUs")
        return self

    def figure(self, name: str) -> float | None:
        """Return a figure's value by its name in :class:`Figures`, or None if it is not known."""
        figure: Figure | None = getattr(self.figures, name)
        return None if figure is None else figure.value

    @property
    def argument(self) -> str:
        """What ``--gpu`` takes for exactly this: ``l4``, ``2xl4``."""
        return self.id if self.count == 1 else f"{self.count}x{self.id}"

    @property
    def sm(self) -> int | None:
        """Compute capability as one number, as 89 for ``8.9`` and 120 for ``12.0``."""
        if self.compute_capability is None:
            return None
        return int(self.compute_capability.replace(".", ""))

    @property
    def memory_bytes(self) -> int | None:
        """Memory of one device: what the driver leaves where that is known, else the nominal."""
        gib = self.figure("usable_memory_gib") or self.figure("memory_gib")
        return None if gib is None else round(gib * 2**30)

    @property
    def bandwidth_gb_s(self) -> float | None:
        """Memory bandwidth of one device, 10^9 bytes per second."""
        return self.figure("bandwidth_gb_s")

    @property
    def fp32_tflops(self) -> float | None:
        """Peak FP32 rate, without TF32."""
        return self.figure("fp32_tflops")

    @property
    def fp16_tflops(self) -> float | None:
        """Peak dense FP16 rate that accumulates in FP32."""
        return self.figure("fp16_tflops")

    @property
    def bf16_tflops(self) -> float | None:
        """Peak dense BF16 rate."""
        return self.figure("bf16_tflops")

    @property
    def int8_tops(self) -> float | None:
        """Peak dense INT8 rate."""
        return self.figure("int8_tops")

    @property
    def int4_tops(self) -> float | None:
        """Peak dense INT4-by-INT4 rate, which no serving engine uses."""
        return self.figure("int4_tops")

    @property
    def fp8_tflops(self) -> float | None:
        """Peak dense FP8 rate that accumulates in FP32."""
        return self.figure("fp8_tflops")

    @property
    def fp4_tflops(self) -> float | None:
        """Peak dense FP4 rate."""
        return self.figure("fp4_tflops")

    @property
    def tdp_w(self) -> float | None:
        """Power limit, watts."""
        return self.figure("tdp_w")

    @property
    def unknown(self) -> tuple[str, ...]:
        """Figures that are not known and that this device does have.

        A rate that follows from no unit of the device (FP8 on an A100) is not unknown: it is
        absent, and the capabilities say so.
        """
        return tuple(
            name
            for name in FIGURE_NAMES
            if getattr(self.figures, name) is None and self._may_have(name)
        )

    @property
    def capabilities(self) -> Capabilities:
        """What the device computes natively, derived from its generation."""
        sixteen = [rate for rate in (self.fp16_tflops, self.bf16_tflops) if rate is not None]
        return derive_capabilities(
            vendor=self.vendor,
            kind=self.kind,
            sm=self.sm,
            isa=self.isa,
            instruction_sets=self.instruction_sets,
            rate_int8=self.int8_tops,
            rate_16bit=max(sixteen, default=None),
        )

    def _may_have(self, figure: str) -> bool:
        if figure == "usable_memory_gib":
            return False
        if self.kind == "cpu":
            # A generic CPU's memory and rates depend on the machine: only bandwidth is a figure.
            return figure in ("memory_gib", "bandwidth_gb_s")
        able = self.capabilities
        needs: dict[str, bool | None] = {
            "fp16_accumulate_tflops": able.fp16_tensor_cores and self.vendor == "NVIDIA",
            "bf16_tflops": able.bf16,
            "int8_tops": able.int8_any,
            "int4_tops": able.int4_tensor_cores,
            "fp8_tflops": able.fp8,
            "fp4_tflops": able.fp4,
        }
        return needs.get(figure) is not False

    def to_plan(self) -> Hardware:
        """Return the part of the profile that a plan records."""
        return Hardware(
            id=self.id,
            name=self.name,
            vendor=self.vendor,
            compute_capability=self.compute_capability,
            memory_bytes=self.memory_bytes,
            count=self.count,
            instruction_sets=self.instruction_sets,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the profile for JSON: figures flat, then their sources, then what follows."""
        document: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "vendor": self.vendor,
            "kind": self.kind,
            "architecture": self.architecture,
            "compute_capability": self.compute_capability,
            "isa": self.isa,
            "instruction_sets": list(self.instruction_sets),
            "count": self.count,
            "devices_per_card": self.devices_per_card,
            "memory_bytes": self.memory_bytes,
        }
        rates = (name for name in FIGURE_NAMES if not name.endswith("memory_gib"))
        document |= {name: self.figure(name) for name in rates}
        document["capabilities"] = self.capabilities.to_dict()
        document["unknown"] = list(self.unknown)
        document["sources"] = {
            name: {"grade": figure.grade, "source": figure.source}
            for name in FIGURE_NAMES
            if (figure := getattr(self.figures, name)) is not None
        }
        document["notes"] = list(self.notes)
        return document
