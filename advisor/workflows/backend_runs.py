"""``backends run``, and ``apply`` of a plan that names a backend: made elsewhere, measured here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.backends.quantizing import Request, check_ready, quantize
from advisor.backends.registry import get_backend
from advisor.backends.requests import rule_of
from advisor.errors import InputError
from advisor.plan.files import save_plan
from advisor.plan.hashing import sha256_file
from advisor.schemes import parse_scheme
from advisor.workflows.backend_requests import requested
from advisor.workflows.checking import check_counts, check_request
from advisor.workflows.computing import device_for
from advisor.workflows.progress import ProgressCallback, ProgressEvent, ignore_progress, stage
from advisor.workflows.resolve import check_model_name, resolve_model_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from advisor.backends.jobs import JobResult
    from advisor.evaluation.measure import Measurement
    from advisor.plan.schema import BackendChoice, Plan


@dataclass(frozen=True, slots=True)
class BackendRun:
    """A checkpoint that another library made, and what was measured of it.

    Attributes:
        request: What was asked.
        result: What the library's worker says.
        plan: The plan, which is also in the folder.
        output: The checkpoint.
        measurement: Paired with the 16-bit model.
        remarks: What was asked for and changes nothing.
    """

    request: Request
    result: JobResult
    plan: Plan
    output: Path
    measurement: Measurement
    remarks: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor backends run --json``."""
        expected = self.plan.expected
        return {
            "schema_version": 1,
            "backend": self.request.backend.name,
            "version": self.result.version,
            "versions": self.result.versions,
            "lock_sha256": self.request.lock_sha256,
            "settings": self.request.all_settings,
            "scheme": str(self.request.scheme),
            "name": self.plan.scheme.name,
            "format": self.plan.scheme.format,
            "output": str(self.output),
            "plan": str(self.output / _plan_name()),
            "size_bytes": expected.size_bytes,
            "bits_per_weight": expected.bits_per_weight,
            **self.measurement.to_dict(),
            "seconds": self.result.seconds,
            "peak_memory_bytes": self.result.peak_memory_bytes,
            "notes": [*self.remarks, *_notes(self.request, self.result)],
        }


def run_backend(
    name: str,
    model: str | Path,
    scheme: str,
    output: str | Path,
    *,
    settings: Sequence[str] = (),
    device: str = "auto",
    timeout: str | float | None = None,
    gpu: str = "auto",
    engine: str = "auto",
    calibration: Sequence[str] = (),
    evaluation: Sequence[str] = (),
    samples: int = 32,
    sequence_length: int = 256,
    evaluation_sequences: int = 32,
    seed: int = 0,
    progress: ProgressCallback | None = None,
) -> BackendRun:
    """Have another library quantize a model, and measure what it made as our own.

    Args:
        name: The backend.
        model: Folder of the 16-bit model, or a Hugging Face id.
        scheme: Name of a scheme that the backend makes.
        output: Folder to make; a plan is written into it.
        settings: The backend's own settings, each ``name=value``.
        device: Where it runs: ``auto``, ``cpu`` or ``cuda``; what it made is measured on an
            accelerator with room for it unless this is ``cpu``.
        timeout: Seconds, or text such as ``2h``, after which it is ended.
        gpu: Device that the plan's kernel is judged for.
        engine: Engine that the plan's kernel is judged for.
        calibration: Text to calibrate on; by default ``builtin:general``.
        evaluation: Text to judge on; the built-in one by default.
        samples: Calibration sequences.
        sequence_length: Tokens of a sequence.
        evaluation_sequences: Sequences to judge on.
        seed: Of every random choice.
        progress: Called with events.

    Raises:
        InputError: A value breaks a rule; nothing is written then.
        BackendError: The library cannot run here, is not installed, or failed.
    """
    from advisor.formats.folder import check_output
    from advisor.models.device import computing
    from advisor.models.load import check_model_folder, load_model
    from advisor.predict.models import load_modelspec
    from advisor.workflows.own_text import OwnText, keep_own_text
    from advisor.workflows.texts import check_sources, draw

    target, report = Path(output), progress or ignore_progress
    asked = check_request(
        gpu=gpu, engine=engine,
        others=[
            lambda: requested(name, scheme, settings, device, timeout, seed),
            lambda: check_counts(
                samples=samples, sequence_length=sequence_length,
                evaluation_sequences=evaluation_sequences, seed=seed,
            ),
            lambda: check_output(target),
            lambda: check_sources(calibration),
        ],
        late=[
            lambda: check_sources(evaluation, own=False),
            lambda: check_model_name(model),
        ],
    )  # fmt: skip
    request = requested(name, scheme, settings, device, timeout, seed)
    backend, hardware, engine_name = request.backend, asked.hardware, asked.engine
    rule = rule_of(backend, request.scheme)
    folder = resolve_model_folder(model)
    check_model_folder(folder)
    spec = load_modelspec(folder)
    check_ready(request, spec.linears)
    # The library's torch may see a device that this one does not.
    choice = device_for(
        "cpu" if device == "cpu" else "auto", spec, length=sequence_length,
        sequences=evaluation_sequences, quantizing=False,
    )  # fmt: skip
    loaded = load_model(folder, device=choice.device)
    tokens = None
    if rule.needs_text:
        with computing(choice.device):
            tokens = draw(
                calibration, loaded.tokenizer, role="calibration", sequences=samples,
                sequence_length=sequence_length, seed=seed, own=OwnText(loaded, report),
            )  # fmt: skip
    judged = draw(
        evaluation, loaded.tokenizer, role="evaluation", sequences=evaluation_sequences,
        sequence_length=sequence_length, seed=seed,
    )  # fmt: skip
    from advisor.workflows.backend_plans import measure_made, plan_of

    result = quantize(
        request, folder, target, loaded.linears, tokens, progress=forward(report, backend.name)
    )
    with computing(choice.device):
        made = measure_made(
            request, target, loaded, spec, judged, stage(report, "Reference"),
            stage(report, "Measuring"),
        )  # fmt: skip
    plan = plan_of(request, result, made, loaded, spec, hardware, engine_name, tokens, judged)
    keep_own_text(tokens, target / _plan_name())
    save_plan(plan, target / _plan_name())
    remarks = []
    if calibration and tokens is None:
        remarks.append(f"{request.scheme} is made without text: --calibration changes nothing")
    return BackendRun(request, result, plan, target, made.measurement, tuple(remarks))


def request_of(choice: BackendChoice, plan: Plan) -> Request:
    """Return what a plan asks of its backend.

    Raises:
        InputError: The backend is unknown, or its lock file is another one than the plan's.
    """
    backend = get_backend(choice.name)
    seed = plan.calibration.seed if plan.calibration is not None else 0
    request = Request(backend, parse_scheme(choice.scheme), dict(choice.settings), seed=seed)
    if request.lock_sha256 != choice.lock_sha256:
        raise InputError(
            f"the plan was made with other versions in {backend.name}'s environment: its lock "
            f"file's sha256 is {request.lock_sha256[:16]} here, the plan says "
            f"{choice.lock_sha256[:16]}. Use the Advisor that made the plan "
            f"({plan.advisor_version}), or make a new plan: advisor backends run {backend.name}"
        )
    return request


def make_planned(
    plan: Plan,
    choice: BackendChoice,
    plan_path: Path,
    folder: Path,
    output: Path,
    report: ProgressCallback,
) -> tuple[dict[str, str], int]:
    """Make the checkpoint of a plan that names a backend.

    Returns:
        sha256 by tensor file, and the number of quantized modules.

    Raises:
        InputError: The plan or the model is not what it should be.
        BackendError: The library cannot run here, is not installed, or failed.
    """
    from advisor.formats.read import read_checkpoint
    from advisor.models.checkpoint import weight_files
    from advisor.models.load import load_model
    from advisor.workflows.own_text import OwnText, keep_own_text
    from advisor.workflows.texts import redraw

    request = request_of(choice, plan)
    loaded = load_model(folder)
    check_ready(request, loaded.linears)
    tokens = None
    if plan.calibration is not None:
        own = OwnText(loaded, report, plan_path)
        tokens = redraw(plan.calibration, loaded.tokenizer, "calibration", own)
    quantize(
        request, folder, output, loaded.linears, tokens,
        progress=forward(report, request.backend.name),
    )  # fmt: skip
    keep_own_text(tokens, output / _plan_name())
    files = {path.name: sha256_file(path) for path in weight_files(output)}
    return files, len(read_checkpoint(output).modules)


def forward(report: ProgressCallback, name: str) -> Callable[[str, int, int], None]:
    """Return what turns a worker's steps into events."""

    def step(stage_name: str, done: int, total: int) -> None:
        report(ProgressEvent(f"{name}: {stage_name}", done, total))

    return step


def _plan_name() -> str:
    from advisor.workflows.applying import PLAN_NAME

    return PLAN_NAME


def _notes(request: Request, result: JobResult) -> list[str]:
    remark = request.backend.remark
    return [*([remark] if remark else []), *result.notes]
