"""Feature gates: what follows from a device's generation alone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device computes natively; None where it is not known.

    Attributes:
        dp4a: Four-way INT8 dot product with INT32 sum in the ordinary cores.
        fp16_tensor_cores: FP16 matrix units (tensor cores, MFMA, WMMA, XMX).
        bf16: BF16 matrix units.
        int8_tensor_cores: INT8 matrix units.
        int4_tensor_cores: INT4-by-INT4 matrix units. No serving engine uses them.
        fp8: FP8 matrix units.
        fp4: FP4 matrix units.
        fp8_variant: ``ocp``, or ``fnuz`` where the bit patterns differ (CDNA3).
        int8_faster_than_16bit: Whether INT8 matrix products outrun 16-bit ones. False where INT8
            runs at the FP16 rate (CDNA2, RDNA3) or was cut down (sm_103).
        avx2: CPU has AVX2.
        avx512: CPU has the AVX-512 foundation, byte and word instructions.
        avx512_vnni: CPU has AVX-512 VNNI.
        avx_vnni: CPU has AVX-VNNI (256 bits).
        avx512_bf16: CPU has AVX-512 BF16.
        amx_int8: CPU has AMX tiles of INT8.
        amx_bf16: CPU has AMX tiles of BF16.
        neon: CPU has NEON.
        neon_dotprod: CPU has the NEON dot product (SDOT).
        neon_i8mm: CPU has the INT8 matrix extension (SMMLA).
    """

    dp4a: bool | None = None
    fp16_tensor_cores: bool | None = None
    bf16: bool | None = None
    int8_tensor_cores: bool | None = None
    int4_tensor_cores: bool | None = None
    fp8: bool | None = None
    fp4: bool | None = None
    fp8_variant: str | None = None
    int8_faster_than_16bit: bool | None = None
    avx2: bool = False
    avx512: bool = False
    avx512_vnni: bool = False
    avx_vnni: bool = False
    avx512_bf16: bool = False
    amx_int8: bool = False
    amx_bf16: bool = False
    neon: bool = False
    neon_dotprod: bool = False
    neon_i8mm: bool = False

    @property
    def int8_any(self) -> bool | None:
        """Whether there is any INT8 unit: matrix units or DP4A."""
        if self.dp4a or self.int8_tensor_cores:
            return True
        if self.dp4a is None or self.int8_tensor_cores is None:
            return None
        return False

    def to_dict(self) -> dict[str, bool | str | None]:
        """Return the gates for JSON."""
        return asdict(self)


_GAIN = 1.2
"""A rate counts as faster from this factor on."""

# Generations of other vendors' GPUs by compilation target.
# RDNA3 has INT8 and INT4 in WMMA, INT8 at the FP16 rate; CDNA3's FP8 is the FNUZ variant.
_OTHER_GPUS: dict[str, dict[str, bool | str | None]] = {
    "gfx90a": {
        "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "int4_tensor_cores": False, "fp8": False, "fp4": False, "int8_faster_than_16bit": False,
    },
    "gfx942": {
        "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "int4_tensor_cores": False, "fp8": True, "fp4": False, "fp8_variant": "fnuz",
        "int8_faster_than_16bit": True,
    },
    "gfx1100": {
        "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "int4_tensor_cores": True, "fp8": False, "fp4": False, "int8_faster_than_16bit": False,
    },
    "xe-hpg": {
        "dp4a": True, "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "fp8": False, "fp4": False,
    },
    "xe2": {
        "dp4a": True, "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "fp8": False, "fp4": False,
    },
    "xe-hpc": {
        "fp16_tensor_cores": True, "bf16": True, "int8_tensor_cores": True,
        "fp8": False, "fp4": False,
    },
}  # fmt: skip


def derive_capabilities(
    *,
    vendor: str,
    kind: str,
    sm: int | None,
    isa: str | None,
    instruction_sets: Collection[str],
    rate_int8: float | None = None,
    rate_16bit: float | None = None,
) -> Capabilities:
    """Return the feature gates of a device.

    Args:
        vendor: ``NVIDIA``, ``AMD``, ...
        kind: ``gpu`` or ``cpu``.
        sm: NVIDIA's compute capability as one number, as 89.
        isa: Compilation target of another vendor's GPU, as ``gfx942``.
        instruction_sets: Of a CPU, as Linux names them.
        rate_int8: Peak INT8 rate, if known; decides ``int8_faster_than_16bit``.
        rate_16bit: Peak rate of FP16 or BF16, the better one, if known.
    """
    if kind == "cpu":
        return _cpu_capabilities(frozenset(instruction_sets))
    gain = None
    if rate_int8 is not None and rate_16bit is not None:
        gain = rate_int8 >= _GAIN * rate_16bit
    if vendor == "NVIDIA" and sm is not None:
        return _nvidia_capabilities(sm, gain)
    known = dict(_OTHER_GPUS.get(isa or "", {}))
    if gain is not None:
        known["int8_faster_than_16bit"] = gain
    return Capabilities(**known)  # type: ignore[arg-type]


def _nvidia_capabilities(sm: int, gain: bool | None) -> Capabilities:
    """Return the gates of an NVIDIA GPU.

    The instruction tables of the PTX manual: dp4a from sm_61 (the P100's sm_60 lacks it),
    ``mma`` with f16 from sm_70, s8 from sm_72, s4 from sm_75 (emulated from sm_90 on), bf16 from
    sm_80, e4m3 from sm_89, e2m1 from sm_100.
    """
    int8 = sm >= 72
    if gain is None:
        # Without figures: tensor cores double the FP16 rate, but sm_103 dropped most of its INT8;
        # sm_61 has no tensor cores, but FP16 at 1/64 rate.
        gain = (int8 and sm != 103) or sm == 61
    return Capabilities(
        dp4a=sm >= 61,
        fp16_tensor_cores=sm >= 70,
        bf16=sm >= 80,
        int8_tensor_cores=int8,
        int4_tensor_cores=75 <= sm <= 89,
        fp8=sm >= 89,
        fp4=sm >= 100,
        fp8_variant="ocp" if sm >= 89 else None,
        int8_faster_than_16bit=gain,
    )


def _cpu_capabilities(sets: frozenset[str]) -> Capabilities:
    vnni = bool(sets & {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})
    return Capabilities(
        dp4a=False,
        fp16_tensor_cores=False,
        bf16=bool(sets & {"avx512_bf16", "amx_bf16", "bf16"}),
        int8_tensor_cores="amx_int8" in sets,
        int4_tensor_cores=False,
        fp8=False,
        fp4=False,
        int8_faster_than_16bit=vnni or "avx2" in sets or None,
        avx2="avx2" in sets,
        avx512={"avx512f", "avx512bw"} <= sets,
        avx512_vnni="avx512_vnni" in sets,
        avx_vnni="avx_vnni" in sets,
        avx512_bf16="avx512_bf16" in sets,
        amx_int8="amx_int8" in sets,
        amx_bf16="amx_bf16" in sets,
        neon="neon" in sets,
        neon_dotprod="asimddp" in sets,
        neon_i8mm="i8mm" in sets,
    )
