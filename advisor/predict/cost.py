"""What quantizing costs: minutes and memory on given hardware, and whether it can be done there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from advisor.predict.decode_step import compute_rate

if TYPE_CHECKING:
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.schemes import Scheme

_REFERENCE_TFLOPS = 312.0
"""The published times are of an A100: 312 dense BF16 TFLOPS."""
_EXPONENT = 0.45
"""Times fall less than rates rise: GPTQ of 6.7B takes 14 minutes on a laptop GPU, 10 on an A100."""
_CPU_TFLOPS = 0.5

_MINUTES_PER_BILLION: dict[str, tuple[float, float]] = {
    # method: (fixed minutes, minutes per 10^9 parameters on an A100)
    "gptq": (0.3, 1.5),
    "awq": (0.5, 1.6),
    "smoothquant": (0.5, 1.2),
    "autoround": (1.0, 1.65),
    "hqq": (0.2, 0.06),
    "rtn": (0.1, 0.05),
    "bnb": (0.1, 0.05),
    "llm.int8": (0.1, 0.05),
    "gguf": (0.2, 0.18),
}
_CALIBRATED = ("gptq", "awq", "smoothquant", "autoround")
_CALIBRATION_TOKENS = 128 * 2048
_BASE_BYTES = 600 * 2**20


@dataclass(frozen=True, slots=True)
class CostEstimate:
    """Predicted cost of quantizing.

    Attributes:
        minutes: Wall time; the published times scatter by a factor of two.
        peak_memory_bytes: Peak on the device, working layer by layer.
        host_memory_bytes: Memory of the machine itself that the weights wait in.
        possible: Whether the peak fits the device; None where its memory is not known.
        words: How it is done.
    """

    minutes: float
    peak_memory_bytes: int
    host_memory_bytes: int
    possible: bool | None
    words: str

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_cost`` object of a candidate's JSON."""
        return {
            "minutes": float(f"{self.minutes:.2g}"),
            "peak_memory_bytes": self.peak_memory_bytes,
            "host_memory_bytes": self.host_memory_bytes,
            "possible": self.possible,
            "how": self.words,
        }


def quantization_cost(spec: ModelSpec, scheme: Scheme, hardware: HardwareProfile) -> CostEstimate:
    """Predict the cost of quantizing a model with 128 sequences of 2048 tokens.

    Calibrated methods run block by block: one block and the hidden states of the calibration
    tokens are on the device, everything else waits in host memory or on disk.
    """
    sixteen_bit = 2 * spec.parameters
    if not scheme.is_quantized:
        return CostEstimate(0.0, 0, 0, True, "nothing to do")
    method = scheme.method if scheme.method in _MINUTES_PER_BILLION else "rtn"
    if scheme.method == "mixed":
        method = "gptq"
    fixed, slope = _MINUTES_PER_BILLION[method]
    billions = spec.quantizable_parameters / 1e9
    factor = 1.0
    if method in (*_CALIBRATED, "hqq"):
        rate = compute_rate(hardware, "16-bit")
        tflops = _CPU_TFLOPS if rate is None else rate / 1e12
        factor = (_REFERENCE_TFLOPS / tflops) ** _EXPONENT
    minutes = fixed + slope * billions * factor
    peak = _peak(spec, method)
    memory = hardware.memory_bytes
    possible = None if memory is None else peak <= memory
    if hardware.kind == "cpu":
        return CostEstimate(minutes, peak + sixteen_bit, sixteen_bit, None, _words(method, None))
    return CostEstimate(minutes, peak, sixteen_bit, possible, _words(method, possible))


def _peak(spec: ModelSpec, method: str) -> int:
    blocks = max(1, spec.blocks)
    largest = max((kind.in_features * kind.out_features for kind in spec.shape_classes), default=0)
    width = max((kind.in_features for kind in spec.shape_classes), default=0)
    block = 2 * spec.quantizable_parameters // blocks
    if method not in _CALIBRATED:
        return _BASE_BYTES + 6 * largest
    # One block in 16 bits, one weight in FP32 with its codes, H and its Cholesky factor in FP32,
    # and the activations of a few sequences; the calibration's hidden states stay on the host.
    hessians = 2 * 4 * width * width
    activations = 2 * 4 * 2048 * (spec.hidden_size * 4 + width)
    gradients = 4 * block if method == "autoround" else 0
    return _BASE_BYTES + block + 8 * largest + hessians + activations + gradients


def _words(method: str, possible: bool | None) -> str:
    if method not in _CALIBRATED:
        return "tensor by tensor, no calibration text"
    how = "block by block: one block on the device, the rest in host memory or on disk"
    if possible is False:
        return f"one block does not fit the device; {how} on a larger GPU, or on the CPU"
    return how
