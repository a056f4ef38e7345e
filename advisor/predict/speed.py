"""Decode and prefill speed: bytes moved, operations, and what an engine spends on every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.predict.speed_data import coefficients_of

if TYPE_CHECKING:
    from advisor.engines.verdict import Verdict
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
class Range:
    """A prediction with its interval (about 80%)."""

    low: float
    expected: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return the three numbers, rounded to what they are worth."""
        return {
            "low": _round(self.low),
            "expected": _round(self.expected),
            "high": _round(self.high),
        }


@dataclass(frozen=True, slots=True)
class SpeedEstimate:
    """Predicted speed of serving.

    Attributes:
        decode: Tokens per second, summed over the batch; None where the device's memory bandwidth
            is not known.
        prefill: Prompt tokens per second; None where no arithmetic rate is known.
        bound: What the decode step mostly waits for: ``memory``, ``compute`` or ``overhead``.
        words: The same for a reader, and what it means for the choice.
    """

    decode: Range | None
    prefill: Range | None
    bound: str | None
    words: str


@dataclass(frozen=True, slots=True)
class _Workload:
    """Bytes and operations of one decode step, and of a prompt token."""

    linear_bytes: float
    other_bytes: float
    cache_bytes: float
    unpacked_bytes: float
    products: float
    """Multiply-adds of all linears and the head per token."""


def predict_speed(
    spec: ModelSpec,
    scheme: Scheme,
    kernel: Verdict,
    hardware: HardwareProfile,
    engine: str,
    *,
    linear_bytes: int,
    context: int,
    batch: int,
    head_bytes: int | None = None,
) -> SpeedEstimate:
    """Predict decode and prefill speed.

    Args:
        spec: The model.
        scheme: Scheme of its linears.
        kernel: Verdict on the scheme; ``none`` gives no speed.
        hardware: The device; ``count`` of them share the work by tensor parallelism.
        engine: Name of the engine.
        linear_bytes: Bytes of all quantizable linears as stored.
        context: Tokens in the cache of each sequence.
        batch: Sequences decoded together.
        head_bytes: Bytes of the head where it is quantized; otherwise 16 bits are read.
    """
    if kernel.support == "none":
        return SpeedEstimate(None, None, None, "no kernel runs this scheme here")
    coefficients = coefficients_of(engine)
    key = kernel.speed if kernel.speed in coefficients.kernels else "default"
    constants = coefficients.kernels[key]
    if kernel.support == "emulated":
        linear_bytes = 2 * spec.quantizable_parameters
    if kernel.support == "emulated":
        head_bytes = None
    work = _workload(spec, linear_bytes, context, batch, head_bytes)
    prefill = _prefill(spec, kernel, hardware, coefficients, constants, scheme, work, context)
    bandwidth = hardware.bandwidth_gb_s
    if bandwidth is None:
        return SpeedEstimate(
            None, prefill, None,
            f"decode speed is not predicted: it hangs on the memory bandwidth of {hardware.name}, "
            "which is not known; `advisor profile --measure` finds out",
        )  # fmt: skip
    memory, compute, overhead = _step_seconds(
        spec, kernel, hardware, coefficients, constants, scheme, work, batch, bandwidth * 1e9
    )
    busy = max(memory, compute) if compute is not None else memory
    seconds = busy + overhead if coefficients.combine == "sum" else max(busy, overhead)
    decode = _range(batch / seconds, coefficients.spread)
    bound, words = _explain(memory, compute, overhead)
    return SpeedEstimate(decode, prefill, bound, words)


def _workload(
    spec: ModelSpec, linear_bytes: float, context: int, batch: int, head_bytes: int | None
) -> _Workload:
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
    return _Workload(
        linear_bytes=linear_bytes * read,
        other_bytes=2.0 * head if head_bytes is None else float(head_bytes),
        cache_bytes=2.0 * cache * batch,
        unpacked_bytes=4.0 * total * read,
        products=dense + experts * share + head,
    )


def _step_seconds(
    spec: ModelSpec,
    kernel: Verdict,
    hardware: HardwareProfile,
    coefficients: EngineSpeed,
    constants: KernelSpeed,
    scheme: Scheme,
    work: _Workload,
    batch: int,
    bandwidth: float,
) -> tuple[float, float | None, float]:
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
    return memory, compute, overhead


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
    rate = rates.get(compute) or sixteen
    return None if rate is None else rate * 1e12


def _prefill(
    spec: ModelSpec,
    kernel: Verdict,
    hardware: HardwareProfile,
    coefficients: EngineSpeed,
    constants: KernelSpeed,
    scheme: Scheme,
    work: _Workload,
    context: int,
) -> Range | None:
    rate = compute_rate(hardware, kernel.compute)
    sixteen = compute_rate(hardware, "16-bit")
    if rate is None or sixteen is None:
        return None
    rows = float(max(1, context))
    ramp = constants.ramp
    if constants.ramp_8bit is not None and scheme.bits >= 8:
        ramp = constants.ramp_8bit
    linear = 2.0 * work.products * (rows + ramp) / (rate * constants.utilization)
    # Attention: two products of every token with half of the context, always in 16 bits.
    attention = 4.0 * spec.hidden_size * spec.blocks * rows * rows / 2 / (sixteen * 0.4)
    layer = constants.batched_layer_us or constants.layer_us
    overhead = (coefficients.step_us + layer * max(1, spec.blocks)) * 1e-6
    if constants.dequantizes and hardware.bandwidth_gb_s:
        overhead += work.unpacked_bytes / (hardware.bandwidth_gb_s * 1e9)
    seconds = (linear + attention) / hardware.count + overhead
    if coefficients.parallel != "tensor":
        seconds = linear + attention + overhead
    # Few of the published figures say how prompts were fed: the interval is wide on purpose.
    return _range(rows / seconds, max(0.5, coefficients.spread))


def _explain(memory: float, compute: float | None, overhead: float) -> tuple[str, str]:
    parts = {"memory": memory, "compute": compute or 0.0, "overhead": overhead}
    bound = max(parts, key=lambda name: parts[name])
    words = {
        "memory": "decoding is memory-bound: fewer bits per weight make it faster",
        "compute": "decoding is compute-bound at this batch: INT8 or FP8 arithmetic makes it "
        "faster, weight-only quantization does not",
        "overhead": "the engine's fixed cost per step dominates: quantization changes speed "
        "little, a leaner engine or a larger batch does",
    }[bound]
    return bound, words


def _range(expected: float, spread: float) -> Range:
    return Range(expected / (1 + spread), expected, expected * (1 + spread))


def _round(value: float) -> float:
    return float(f"{value:.4g}")
