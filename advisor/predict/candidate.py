"""One candidate: a scheme with everything that is predicted of it, and whether it fits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from advisor.engines import Verdict, format_for, verdict
from advisor.engines.outer import ends_taking
from advisor.errors import InputError
from advisor.predict.cost import CostEstimate, quantization_cost
from advisor.predict.loss import LossEstimate, predict_loss
from advisor.predict.memory import MemoryEstimate, Serving, serving_memory
from advisor.predict.size import SizeEstimate, checkpoint_size
from advisor.predict.speed import SpeedEstimate, predict_speed
from advisor.schemes import BF16, Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.modelspec.outer import OuterModule


_SIZED_AS: dict[str, str] = {"modelopt": "compressed-tensors"}
"""Formats that no writer knows, and the one whose tensors are nearest."""

SCHEME_NAMES: tuple[str, ...] = (
    "bf16",
    "rtn-fp8-gch-afp8", "rtn-fp8-gtensor-afp8", "rtn-fp8-gch",
    "rtn-int8-gch-sym-aint8", "smoothquant-int8-gch-sym-aint8", "rtn-int8-gch-sym",
    "gptq-int8-g128-sym", "llm.int8",
    "gptq-int4-g32-sym", "gptq-int4-g64-sym", "gptq-int4-g128-sym", "gptq-int4-g128-sym-actorder",
    "gptq-int4-g128-asym", "gptq-int4-gch-sym",
    "awq-int4-g32-asym", "awq-int4-g64-asym", "awq-int4-g128-asym",
    "autoround-int4-g128-sym",
    "rtn-int4-g32-sym", "rtn-int4-g64-sym", "rtn-int4-g128-sym",
    "hqq-int4-g64-asym", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4",
    "gptq-int4-g128-sym-afp8",
    "mxfp4", "nvfp4", "nvfp4-anvfp4",
    "gptq-int3-g64-sym", "gptq-int3-g128-sym", "gptq-int2-g64-sym",
    "gguf-q8_0", "gguf-q6_k", "gguf-q5_k_m", "gguf-q5_k_s", "gguf-q4_k_m", "gguf-q4_k_s",
    "gguf-q4_0", "gguf-q3_k_l", "gguf-q3_k_m", "gguf-q3_k_s", "gguf-q2_k",
)  # fmt: skip
"""Every uniform scheme that is weighed."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model is served for."""

    context: int
    batch: int


@dataclass(frozen=True, slots=True)
class Violation:
    """A limit that a candidate does not keep."""

    budget: str
    limit: float | None
    value: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the violation for JSON."""
        return {"budget": self.budget, "limit": self.limit, "value": self.value}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scheme, predicted.

    Attributes:
        scheme: The scheme; the candidate's name is its name.
        format: Checkpoint format that the engine reads it in; None where it reads none.
        kernel: How the engine runs it.
        size: Its checkpoint; None where the scheme cannot be stored for this model.
        memory: Peak memory when serving.
        loss: Loss of quality, by evidence.
        speed: Speed of decoding and prefill.
        speedup: Decode speed over the unquantized model's on the same engine and device.
        cost: Minutes and memory of quantizing.
        violations: Limits that it does not keep.
        problem: Why it cannot be made for this model, else None.
        outer: Scheme of the embedding and the head by module path, where they are quantized too.
        tunable: Whether Advisor itself makes such a checkpoint, or has nothing to make (16 bits).
    """

    scheme: Scheme
    format: str | None
    kernel: Verdict
    size: SizeEstimate | None
    memory: MemoryEstimate | None
    loss: LossEstimate
    speed: SpeedEstimate
    speedup: float | None
    cost: CostEstimate
    violations: tuple[Violation, ...] = ()
    problem: str | None = None
    tunable: bool = True
    outer: Mapping[str, Scheme] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the scheme."""
        return str(self.scheme)

    @property
    def feasible(self) -> bool:
        """Whether a kernel runs it and every limit is kept."""
        return not self.violations and self.kernel.support != "none" and self.problem is None

    @property
    def size_bytes(self) -> int | None:
        """Bytes of the weight files."""
        return None if self.size is None else self.size.total_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as DESIGN section 1 has it."""
        return {
            "name": self.name,
            "method": self.scheme.method,
            "bits": self.scheme.bits,
            "group_size": self.scheme.group_size,
            "symmetric": self.scheme.symmetric,
            "format": self.format,
            "kernel": self.kernel.to_dict(),
            "size_bytes": self.size_bytes,
            "bits_per_weight": None if self.size is None else round(self.size.bits_per_weight, 4),
            "memory_bytes": None if self.memory is None else self.memory.to_dict(),
            "loss": self.loss.to_dict(),
            "decode_tokens_per_s": None
            if self.speed.decode is None
            else self.speed.decode.to_dict(),
            "prefill_tokens_per_s": (
                None if self.speed.prefill is None else self.speed.prefill.to_dict()
            ),
            "speedup_over_16bit": None if self.speedup is None else round(self.speedup, 3),
            "bound": self.speed.bound,
            "quantization_cost": self.cost.to_dict(),
            "outer": {name: str(scheme) for name, scheme in self.outer.items()},
            "tunable": self.tunable,
            "feasible": self.feasible,
            "violations": [violation.to_dict() for violation in self.violations],
        }


def make_candidate(
    spec: ModelSpec,
    scheme: Scheme,
    hardware: HardwareProfile,
    engine: str,
    workload: Workload,
    baseline: SpeedEstimate | None = None,
    ends: Sequence[OuterModule] = (),
) -> Candidate:
    """Predict everything of one scheme; no limit is judged yet.

    Args:
        spec: The model.
        scheme: The scheme of all its linears.
        hardware: The device, ``count`` of them in tensor parallel.
        engine: Name of the engine.
        workload: Context and batch.
        baseline: Speed of the unquantized model; computed if it is not given.
        ends: Embedding and head, where they take the scheme too if the engine reads that. What it
            costs in quality no published evidence says.
    """
    decided = verdict(engine, scheme, hardware, spec.linears)
    carried = decided.format or format_for(engine, scheme)
    taking = ends_taking(scheme, hardware, engine, carried or "", ends)
    outer = dict.fromkeys(taking, scheme)
    size, problem = _size(spec, scheme, carried, decided, outer)
    bare = Candidate(
        scheme=scheme,
        format=carried,
        kernel=decided,
        size=size,
        memory=None,
        loss=predict_loss(spec, scheme),
        speed=SpeedEstimate(None, None, None, ""),
        speedup=None,
        cost=quantization_cost(spec, scheme, hardware),
        problem=problem,
        outer=outer,
    )
    candidate = served(bare, spec, hardware, engine, workload)
    speed = candidate.speed
    if baseline is None:
        baseline = speed if scheme == BF16 else baseline_speed(spec, hardware, engine, workload)
    if speed.decode is not None and baseline.decode is not None:
        return replace(candidate, speedup=speed.decode.expected / baseline.decode.expected)
    return candidate


def served(
    candidate: Candidate,
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    workload: Workload,
) -> Candidate:
    """Return the candidate with its memory and speed on another device or workload.

    Its kernel is taken as it is: decide that anew before another device.
    """
    size = candidate.size
    if size is None:
        return candidate
    serving = Serving(
        engine,
        tensor_parallel=hardware.count if hardware.kind == "gpu" else 1,
        device=hardware.kind,
    )
    memory = serving_memory(spec, size, serving, workload.context, workload.batch)
    speed = predict_speed(
        spec, candidate.scheme, candidate.kernel, hardware, engine,
        linear_bytes=size.quantizable_bytes, context=workload.context, batch=workload.batch,
        head_bytes=(size.head_bytes or size.embedding_bytes) if candidate.outer else None,
    )  # fmt: skip
    return replace(candidate, memory=memory, speed=speed, speedup=None)


def baseline_speed(
    spec: ModelSpec, hardware: HardwareProfile, engine: str, workload: Workload
) -> SpeedEstimate:
    """Return the speed of the unquantized model on the same engine and device."""
    return make_candidate(
        spec, BF16, hardware, engine, workload, SpeedEstimate(None, None, None, "")
    ).speed


def _size(
    spec: ModelSpec,
    scheme: Scheme,
    carried: str | None,
    decided: Verdict,
    outer: Mapping[str, Scheme],
) -> tuple[SizeEstimate | None, str | None]:
    name = _SIZED_AS.get(carried or "", carried) or _usual_format(scheme)
    kept = set(decided.kept_16bit)
    schemes: Any = scheme
    if kept:
        schemes = {linear.name: scheme for linear in spec.linears if linear.name not in kept}
    try:
        return checkpoint_size(spec, schemes, name, outer=outer), None
    except InputError as error:
        return None, str(error)


def _usual_format(scheme: Scheme) -> str:
    """Return a format to size a scheme in that the engine does not read."""
    usual = {
        "gguf": "gguf", "bnb": "bitsandbytes", "llm.int8": "bitsandbytes", "hqq": "hqq",
        "bf16": "safetensors", "fp16": "safetensors", "fp32": "safetensors",
    }  # fmt: skip
    return usual.get(scheme.method, "compressed-tensors")


def judge(candidate: Candidate, budgets: Budgets, memory_limit: int | None) -> Candidate:
    """Return the candidate with every limit it breaks.

    The expected values are judged; the intervals say how sure that is.

    Args:
        candidate: The candidate.
        budgets: The limits.
        memory_limit: Bytes of device memory, from ``--max-memory`` or the device's own.
    """
    decode = None if candidate.speed.decode is None else candidate.speed.decode.expected
    total = None if candidate.memory is None else candidate.memory.total
    checks: tuple[tuple[str, float | None, float | None, bool], ...] = (
        ("max_size", budgets.max_size_bytes, candidate.size_bytes, False),
        ("max_memory", memory_limit, total, False),
        ("max_loss", budgets.max_loss, candidate.loss.expected, False),
        ("max_kl", budgets.max_kl, candidate.loss.kl, False),
        ("max_accuracy_drop", budgets.max_accuracy_drop, candidate.loss.accuracy_drop, False),
        ("min_speed", budgets.min_tokens_per_s, decode, True),
    )
    found = []
    for budget, limit, value, at_least in checks:
        if limit is None or candidate.problem is not None:
            continue
        # A speed that is not known cannot be promised; a size that is not known has its problem.
        if value is None or (value < limit if at_least else value > limit):
            found.append(Violation(budget, limit, value))
    return replace(candidate, violations=tuple(found))
