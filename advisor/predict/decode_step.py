"""One decode step: bytes moved, operations, and what an engine spends on every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.predict.speed_data import coefficients_of

if TYPE_CHECKING:
    from advisor.engines.verdict import Verdict
    from advisor.hardware.capabilities import Capabilities
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.speed_data import EngineSpeed, KernelSpeed
    from advisor.schemes import Scheme

_TILE = 64
"""Batch from which unpacking packed weights costs its full price."""
_ATTENTION_EFFICIENCY = 0.6
"""Share of the bandwidth at which the KV cache is read."""
_CPU_TFLOPS_GUESS = 0.5
_ALLREDUCE_US = 20.0
"""Two all-reduces of a block across tensor-parallel devices, each."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one decode step waits for, in seconds.

    Attributes:
        memory: Reading weights and the KV cache.
        compute: Arithmetic, meanwhile; None where the rate is not known.
        overhead: Everything fixed.
        adds_up: Whether that comes on top; otherwise it hides behind the rest.
    """

    memory: float
    compute: float | None
    overhead: float
    adds_up: bool

    @property
    def seconds(self) -> float:
        """The whole step."""
        busy = max(self.memory, self.compute or 0.0)
        return busy + self.overhead if self.adds_up else max(busy, self.overhead)

    @property
    def arithmetic(self) -> float:
        """What is left of the step however few bytes are read."""
        compute = self.compute or 0.0
        return compute + self.overhead if self.adds_up else max(compute, self.overhead)


@dataclass(frozen=True, slots=True)
class Workload:
    """Bytes and operations of one decode step, and of a prompt token."""

    linear_bytes: float
    other_bytes: float
    cache_bytes: float
    unpacked_bytes: float
    products: float
    """Multiply-adds of all linears and the head per token."""


def decode_step(
    spec: ModelSpec,
    scheme: Scheme,
    kernel: Verdict,
    hardware: HardwareProfile,
    engine: str,
    *,
    linear_bytes: int,
    context: int,
    batch: int,
) -> Step | None:
    """Return what a decode step waits for where all linears have a scheme.

    Args:
        spec: The model.
        scheme: Scheme of its linears.
        kernel: Verdict on the scheme.
        hardware: The device.
        engine: Name of the engine.
        linear_bytes: Bytes of all quantizable linears as stored.
        context: Tokens in the cache of each sequence.
        batch: Sequences decoded together.

    Returns:
        None where no kernel runs it, or the memory bandwidth is not known.
    """
    if kernel.support == "none" or hardware.bandwidth_gb_s is None:
        return None
    coefficients = coefficients_of(engine)
    constants = constants_of(coefficients, kernel)
    linear_bytes, _ = as_read(spec, kernel, linear_bytes, None)
    work = workload_of(spec, linear_bytes, context, batch, None)
    return step_of(
        spec, kernel, hardware, coefficients, constants, scheme, work, batch,
        hardware.bandwidth_gb_s * 1e9,
    )  # fmt: skip


def constants_of(coefficients: EngineSpeed, kernel: Verdict) -> KernelSpeed:
    """Return the coefficients of a verdict's kernel, or those of any."""
    key = kernel.speed if kernel.speed in coefficients.kernels else "default"
    return coefficients.kernels[key]


def as_read(
    spec: ModelSpec, kernel: Verdict, linear_bytes: int, head_bytes: int | None
) -> tuple[int, int | None]:
    """Return the bytes that a step reads of linears and head: all 16 bits where it emulates."""
    if kernel.support == "emulated":
        return 2 * spec.quantizable_parameters, None
    return linear_bytes, head_bytes


def workload_of(
    spec: ModelSpec, linear_bytes: float, context: int, batch: int, head_bytes: int | None
) -> Workload:
    """Return what a decode step moves and multiplies, and what a prompt token does.

    Args:
        spec: The model.
        linear_bytes: Bytes of all quantizable linears as read.
        context: Tokens in the cache of each sequence.
        batch: Sequences decoded together: of experts, the more of them are read.
        head_bytes: Bytes of the head where it is quantized; otherwise 16 bits are read.
    """
    experts = sum(
        kind.in_features * kind.out_features * kind.count
        for kind in spec.shape_classes
        if kind.is_expert
    )
    total = max(1, spec.quantizable_parameters)
    dense = total - experts
    touched = 1.0
    share = 1.0
    if spec.experts:
        share = spec.experts_per_token / spec.experts
        touched = 1.0 - (1.0 - share) ** batch
    read = (dense + experts * touched) / total
    head = spec.vocabulary_size * spec.hidden_size
    cache = sum(
        layer.elements_per_token * min(context, layer.window or context) for layer in spec.attention
    )
    return Workload(
        linear_bytes=linear_bytes * read,
        other_bytes=2.0 * head if head_bytes is None else float(head_bytes),
        cache_bytes=2.0 * cache * batch,
        unpacked_bytes=4.0 * total * read,
        products=dense + experts * share + head,
    )


def step_of(
    spec: ModelSpec,
    kernel: Verdict,
    hardware: HardwareProfile,
    coefficients: EngineSpeed,
    constants: KernelSpeed,
    scheme: Scheme,
    work: Workload,
    batch: int,
    bandwidth: float,
) -> Step:
    """Return the seconds that one decode step spends on memory, arithmetic and everything fixed."""
    devices = hardware.count if coefficients.parallel == "tensor" else 1
    sixteen = coefficients.kernels["16-bit"].efficiency
    memory = work.linear_bytes / constants.efficiency + work.other_bytes / sixteen
    memory += coefficients.cache_factor * work.cache_bytes / _ATTENTION_EFFICIENCY
    if constants.dequantizes and batch > 1:
        memory += work.unpacked_bytes / sixteen
    memory /= bandwidth * devices
    rate = compute_rate(hardware, kernel.compute)
    compute = None
    if rate is not None:
        ramp = constants.ramp
        if constants.ramp_8bit is not None and scheme.bits >= 8:
            ramp = constants.ramp_8bit
        rows = batch + ramp * min(1.0, (batch - 1) / _TILE)
        compute = 2.0 * work.products * rows / (rate * constants.utilization * devices)
    layer = constants.layer_us
    if batch > 1 and constants.batched_layer_us is not None:
        layer = constants.batched_layer_us
    if devices > 1:
        layer += 2 * _ALLREDUCE_US
    overhead = (coefficients.step_us + layer * max(1, spec.blocks)) * 1e-6
    overhead *= _generation(coefficients, hardware)
    return Step(memory, compute, overhead, adds_up=coefficients.combine == "sum")


def _int8_gain(able: Capabilities) -> float:
    """Return how many INT8 products a CPU does in the time of one of float32 (of AMX: bfloat16).

    Dot-product instructions (VNNI, NEON's SDOT) take four where float32 takes one, AVX2's
    VPMADDUBSW two: GGUF's kernels use them, so that fewer bits are never slower for the products.
    """
    if able.amx_bf16:
        return 2.0
    dot = able.avx512_vnni or able.avx_vnni or able.neon_dotprod or able.neon_i8mm
    return 4.0 if dot else 2.0 if able.avx2 else 1.0


def _generation(coefficients: EngineSpeed, hardware: HardwareProfile) -> float:
    return (coefficients.generations or {}).get(hardware.sm or 0, 1.0)


def compute_rate(hardware: HardwareProfile, compute: str) -> float | None:
    """Return the peak rate of one device in operations per second, or None if it is not known.

    GGUF kernels multiply in INT8 where there are INT8 units; 16-bit products are done in float32
    where that is faster (sm_61 has one sixty-fourth of its rate in float16); a CPU's rate follows
    its instruction sets only roughly.
    """
    rates = {
        "int8": hardware.int8_tops,
        "fp8": hardware.fp8_tflops,
        "fp4": hardware.fp4_tflops,
    }
    able_rates = (hardware.fp16_tflops, hardware.bf16_tflops, hardware.fp32_tflops)
    sixteen = max((rate for rate in able_rates if rate is not None), default=None)
    if sixteen is None and hardware.kind == "cpu":
        able = hardware.capabilities
        gain = 8.0 if able.amx_bf16 else 2.0 if able.avx512 else 1.0
        sixteen = _CPU_TFLOPS_GUESS * gain
        rates["int8"] = sixteen * _int8_gain(able)
    rate = rates.get(compute) or sixteen
    return None if rate is None else rate * 1e12
