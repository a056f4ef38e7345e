"""What another library made: read back, measured like our own, and put into a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.budgets import Budgets
from advisor.errors import VerificationError
from advisor.plan.schema import BackendChoice
from advisor.schemes import BF16
from advisor.search.families import Family
from advisor.search.mixture import Mixture

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from advisor.backends.jobs import JobResult
    from advisor.backends.quantizing import Request
    from advisor.calibration.tokens import TokenSequences
    from advisor.evaluation.measure import Measurement
    from advisor.formats.read import Checkpoint
    from advisor.hardware.profile import HardwareProfile
    from advisor.models.load import LoadedModel
    from advisor.modelspec import ModelSpec
    from advisor.plan.schema import Plan
    from advisor.schemes import Scheme

_LISTED = 3


@dataclass(frozen=True, slots=True)
class Made:
    """A checkpoint of another library.

    Attributes:
        mixture: It as a candidate.
        measurement: Paired with the 16-bit model.
    """

    mixture: Mixture
    measurement: Measurement


def read_made(request: Request, folder: Path, spec: ModelSpec) -> tuple[Mixture, Checkpoint]:
    """Read a library's checkpoint as loaders do, and check that it is what was asked for.

    Args:
        request: What was asked.
        folder: The checkpoint.
        spec: The model's tensors.

    Raises:
        VerificationError: The files are faulty, or a module has another scheme than asked for.
    """
    from advisor.formats.read import read_checkpoint
    from advisor.predict.size import checkpoint_size

    checkpoint = read_checkpoint(folder)
    assignment = _assignment(request, checkpoint, spec)
    size = checkpoint_size(spec, checkpoint.modules, checkpoint.format)
    scheme = request.scheme
    used = set(assignment.values())
    one = scheme if used <= {scheme, BF16} and not request.options else None
    mixture = Mixture(
        name=str(one or f"mixed-{size.bits_per_weight:.2f}bpw"),
        family=Family(scheme.method, scheme.symmetric is not False),
        assignment=assignment,
        size_bytes=checkpoint.size_bytes,
        bits_per_weight=size.bits_per_weight,
        predicted_kl=0.0,
        format_name=checkpoint.format,
        backend=request.backend.name,
    )
    return mixture, checkpoint


def _assignment(request: Request, checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, Scheme]:
    """Return the scheme of every module: of those asked for, the one that is stored."""
    from advisor.formats.registry import storage_scheme

    name = request.backend.name
    linears = [linear.name for linear in spec.linears]
    if unknown := sorted(checkpoint.modules.keys() - set(linears)):
        raise VerificationError(
            f"{name} quantized {len(unknown)} modules that are no linears of the model "
            f"(first: {unknown[0]})."
        )
    if checkpoint.format == "safetensors":  # written back in 16 bits
        return dict.fromkeys(linears, BF16)
    asked = [request.scheme, *request.options]
    stored = {
        storage_scheme(scheme, checkpoint.format): scheme
        for scheme in reversed(asked)
        if scheme != BF16
    }
    wrong = [
        f"{linear} is {found}"
        for linear, found in checkpoint.modules.items()
        if found not in stored
    ]
    if wrong:
        expected = ", ".join(map(str, stored))
        raise VerificationError(
            f"{name} was asked for {', '.join(map(str, asked))} ({expected} as stored), but "
            f"{'; '.join(wrong[:_LISTED])}{' ...' if len(wrong) > _LISTED else ''}."
        )
    found_by = checkpoint.modules
    return {name: stored[found_by[name]] if name in found_by else BF16 for name in linears}


def measure_made(
    request: Request,
    folder: Path,
    loaded: LoadedModel,
    spec: ModelSpec,
    judged: TokenSequences,
    reference_progress: Callable[[int, int], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Made:
    """Read a library's checkpoint and measure it on held-out text.

    Args:
        request: What was asked.
        folder: The checkpoint.
        loaded: The 16-bit model.
        spec: Its tensors.
        judged: Held-out sequences.
        reference_progress: Told of the 16-bit model's predictions: (sequences done, in all).
        progress: Told of the checkpoint's: the same.

    Raises:
        VerificationError: The files are faulty, or a module has another scheme than asked for.
    """
    from advisor.evaluation.measure import measure
    from advisor.evaluation.reference import Reference
    from advisor.evaluation.runtime import quantized_model
    from advisor.plan.folders import cache_root
    from advisor.workflows.checkpoints import contents

    mixture, checkpoint = read_made(request, folder, spec)
    reference = Reference.compute(loaded, judged, cache_root(), progress=reference_progress)
    weights, replaced = contents(checkpoint, loaded)
    with quantized_model(loaded.model, weights, replaced) as model:
        measurement = measure(model, reference, progress=progress)
    return Made(mixture, measurement)


def backend_choice(request: Request, version: str, versions: Mapping[str, str]) -> BackendChoice:
    """Return what a plan says of the library."""
    return BackendChoice(
        name=request.backend.name,
        version=version,
        lock_sha256=request.lock_sha256,
        scheme=str(request.scheme),
        settings=request.all_settings,
        versions=dict(versions),
    )


def with_backend(plan: Plan, choice: BackendChoice, *, needs_text: bool) -> Plan:
    """Return a plan whose checkpoint the library makes; our own settings say nothing of it."""
    text = plan.calibration if needs_text else None
    return plan.model_copy(update={"backend": choice, "settings": {}, "calibration": text})


def plan_of(
    request: Request,
    result: JobResult,
    made: Made,
    loaded: LoadedModel,
    spec: ModelSpec,
    hardware: HardwareProfile,
    engine: str,
    calibration: TokenSequences | None,
    judged: TokenSequences,
) -> Plan:
    """Return the plan of a library's checkpoint.

    Args:
        request: What was asked.
        result: What the worker says.
        made: The checkpoint as it was measured.
        loaded: The 16-bit model.
        spec: Its tensors.
        hardware: Device that the kernel is judged for.
        engine: Engine that the kernel is judged for.
        calibration: What the library calibrated on; None where it looks at no text.
        judged: Held-out sequences.
    """
    from advisor.calibration.tokens import check_disjoint
    from advisor.evaluation.gate import decide
    from advisor.methods.settings import QuantizationSettings
    from advisor.search.finalists import Finalist
    from advisor.search.goal import Goal
    from advisor.search.judges import Judges
    from advisor.search.planning import Task, build_plan

    overlap = None if calibration is None else check_disjoint(calibration, judged)
    mixture = made.mixture
    task = Task(
        loaded, spec, hardware, engine, Budgets(), calibration or judged,
        Judges(judged, judged.sequences), 4096, 1, mixture.format_name or "",
        QuantizationSettings(),
    )  # fmt: skip
    finalist = Finalist(mixture, made.measurement, decide(made.measurement, Budgets()))
    plan = build_plan(
        task, Goal(None, None, None, smallest=False), finalist, [finalist], study="none", trials=0,
        seed=request.seed, stopped="completed", spearman=None, overlap=overlap,
    )  # fmt: skip
    choice = backend_choice(request, result.version, result.versions)
    plan = with_backend(plan, choice, needs_text=calibration is not None)
    return plan.model_copy(update={"search": None})
