"""The published speed formula of whichllm, written anew.

Speed = bandwidth / bytes read per token * efficiency of the type * factor of the vendor; a mixture
of experts reads its active share, but at least a floor that rises with the bandwidth.

Reference: Andyyyy64/whichllm, src/whichllm/engine/performance.py (estimate_tok_per_sec) and
quantization.py, commits a5da49d and 02197cc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.predict.size import checkpoint_size
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec

EFFICIENCY = {
    "F16": 0.40, "BF16": 0.40, "Q8_0": 0.45, "Q6_K": 0.50, "Q5_K_M": 0.52, "Q5_K_S": 0.52,
    "Q5_0": 0.50, "Q4_K_M": 0.55, "Q4_K_S": 0.55, "Q4_0": 0.53, "Q3_K_M": 0.50, "Q3_K_S": 0.48,
    "Q3_K_L": 0.50, "Q2_K": 0.45,
}  # fmt: skip
OTHER = 0.45
VENDORS = {"nvidia": 1.0, "amd": 0.78, "apple": 0.82, "intel": 0.65}
BYTES_PER_WEIGHT = {"GPTQ-Int4": 0.5, "AWQ-4bit": 0.5, "GPTQ-Int8": 1.0, "F16": 2.0}


def whichllm_speed(spec: ModelSpec, quant: str, gpu: HardwareProfile) -> float:
    """Return decode tokens/s of one sequence on one GPU."""
    if quant in BYTES_PER_WEIGHT:
        size = spec.parameters * BYTES_PER_WEIGHT[quant]
    else:
        size = checkpoint_size(spec, parse_scheme(f"gguf-{quant.lower()}"), "gguf").total_bytes
    if spec.experts:
        floor = min(0.25, 0.05 * max(1.0, (gpu.bandwidth_gb_s or 0.0) / 256.0))
        size *= min(1.0, max(spec.active_parameters / spec.parameters, floor))
    rate = 1e9 * (gpu.bandwidth_gb_s or 0.0) / size
    return rate * EFFICIENCY.get(quant, OTHER) * VENDORS.get(gpu.vendor.lower(), 0.7)
