"""Decode and prefill speed: bytes moved, operations, and what an engine spends on every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.predict.decode_step import as_read, compute_rate, constants_of, step_of, workload_of
from advisor.predict.speed_data import coefficients_of

if TYPE_CHECKING:
    from advisor.engines.verdict import Verdict
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.predict.decode_step import Workload
    from advisor.predict.speed_data import EngineSpeed, KernelSpeed
    from advisor.schemes import Scheme


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
    constants = constants_of(coefficients, kernel)
    linear_bytes, head_bytes = as_read(spec, kernel, linear_bytes, head_bytes)
    work = workload_of(spec, linear_bytes, context, batch, head_bytes)
    prefill = _prefill(spec, kernel, hardware, coefficients, constants, scheme, work, context)
    bandwidth = hardware.bandwidth_gb_s
    if bandwidth is None:
        return SpeedEstimate(
            None, prefill, None,
            f"decode speed is not predicted: it hangs on the memory bandwidth of {hardware.name}, "
            "which is not known; `advisor profile --measure` finds out",
        )  # fmt: skip
    step = step_of(
        spec, kernel, hardware, coefficients, constants, scheme, work, batch, bandwidth * 1e9
    )
    decode = _range(batch / step.seconds, coefficients.spread)
    bound, words = _explain(step.memory, step.compute, step.overhead)
    return SpeedEstimate(decode, prefill, bound, words)


def _prefill(
    spec: ModelSpec,
    kernel: Verdict,
    hardware: HardwareProfile,
    coefficients: EngineSpeed,
    constants: KernelSpeed,
    scheme: Scheme,
    work: Workload,
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
        "faster, still fewer bits per weight do not",
        "overhead": "the engine's fixed cost per step dominates: quantization changes speed "
        "little, a leaner engine or a larger batch does",
    }[bound]
    return bound, words


def _range(expected: float, spread: float) -> Range:
    return Range(expected / (1 + spread), expected, expected * (1 + spread))


def _round(value: float) -> float:
    return float(f"{value:.4g}")
