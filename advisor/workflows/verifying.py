"""``verify``: is a checkpoint what its plan says; silent wrongness is an error."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import AdvisorError, InputError, VerificationError
from advisor.plan.files import load_plan
from advisor.plan.hashing import hash_model, sha256_file
from advisor.schemes import parse_scheme
from advisor.workflows.applying import PLAN_NAME
from advisor.workflows.checking import Checks
from advisor.workflows.computing import check_device_name, describe_device, device_of_plan
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage
from advisor.workflows.remeasuring import Check, measure_again
from advisor.workflows.resemblance import check_weights, listed

if TYPE_CHECKING:
    from advisor.formats.read import Checkpoint
    from advisor.models.load import LoadedModel
    from advisor.plan.schema import Plan


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Every check, in the order of their cost.

    Attributes:
        plan_path: The plan.
        folder: The checkpoint.
        checks: What was asked.
        warnings: What could not be asked, or may explain a drift.
        measured: KL, loss and agreement measured again; None where files are too broken.
        computed_on: Where it was computed; empty where files are too broken.
    """

    plan_path: Path
    folder: Path
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    measured: dict[str, Any] | None = None
    computed_on: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the checkpoint is what the plan says."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor verify --json``."""
        return {
            "schema_version": 1,
            "plan": str(self.plan_path),
            "folder": str(self.folder),
            "passed": self.passed,
            "checks": [
                {"name": check.name, "passed": check.passed, "detail": check.detail}
                for check in self.checks
            ],
            "warnings": list(self.warnings),
            "measured": self.measured,
            "computed_on": self.computed_on or None,
        }


def verify(
    plan: str | Path,
    folder: str | Path,
    *,
    model: str | Path | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Re-read a checkpoint, compare every module with the plan, and measure it again.

    Args:
        plan: The plan's file.
        folder: The checkpoint.
        model: Where the 16-bit model is, if not where the plan says.
        device: Where it is measured, as for ``tune``.
        progress: Called with events.

    Raises:
        InputError: The plan, the model, the folder or the device is not there or not the right one.
    """
    from advisor.models.device import computing
    from advisor.models.load import load_model
    from advisor.workflows.identity import check_model, device_warnings, version_warnings
    from advisor.workflows.resolve import planned_model_folder

    report = progress or ignore_progress
    plan_path, target = Path(plan), Path(folder)
    places = Checks()
    content = places.run(lambda: load_plan(plan_path))
    places.run(lambda: _check_folder(plan_path, target))
    places.run(lambda: check_device_name(device))
    places.settle()
    if content is None:  # then it was refused
        raise InputError(f"no plan at {plan_path}.")
    source = planned_model_folder(content.model, model)
    check_model(content, source)
    warnings = list(version_warnings(content))
    checks = [_files(content, target, warnings), _tokenizer(content, target)]
    try:
        checkpoint = _read(target)
    except AdvisorError as error:
        checks.append(Check("structure", False, str(error)))
        return VerifyReport(plan_path, target, tuple(checks), tuple(warnings))
    choice = device_of_plan(device, content, source, quantizing=False)
    where = describe_device(choice)
    warnings += device_warnings(content, choice.device)
    loaded = load_model(source, device=choice.device)
    checks.append(
        Check("structure", True, f"{len(checkpoint.modules)} quantized modules are whole")
    )
    checks.append(_schemes(content, checkpoint, loaded))
    measured = None
    try:
        with computing(choice.device):
            checks.append(
                check_weights(content, checkpoint, loaded, stage(report, "Comparing weights"))
            )
            found, measured = measure_again(content, checkpoint, loaded, stage(report, "Measuring"))
        checks.extend(found)
    except VerificationError as error:
        checks.append(Check("weights", False, str(error)))
    return VerifyReport(plan_path, target, tuple(checks), tuple(warnings), measured, where)


def _check_folder(plan_path: Path, target: Path) -> None:
    if target.is_file():
        raise InputError(
            f"{target} is a file. Give the folder that `advisor apply` made: "
            f"{shlex.join(['advisor', 'verify', str(plan_path), str(target.parent)])}"
        )
    if not target.is_dir():
        raise InputError(
            f"no checkpoint at {target}. Make it: "
            f"{shlex.join(['advisor', 'apply', str(plan_path), '-o', str(target)])}"
        )


def _read(folder: Path) -> Checkpoint:
    from advisor.formats.read import read_checkpoint

    return read_checkpoint(folder)


def _files(plan: Plan, folder: Path, warnings: list[str]) -> Check:
    """Compare every file's hash with the plan's, or with the plan inside the checkpoint."""
    expected = plan.outputs
    if not expected and (folder / PLAN_NAME).is_file():
        expected = load_plan(folder / PLAN_NAME).outputs
        warnings.append(f"the plan was not applied here; hashes are those of {PLAN_NAME}")
    if not expected:
        warnings.append("the plan holds no hashes: it was never applied")
        return Check("files", True, "no hashes to compare")
    wrong = []
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif sha256_file(path) != digest:
            wrong.append(f"{name} has changed since it was written")
    extra = {path.name for path in folder.glob("*.safetensors")} - expected.keys()
    wrong += [f"{name} is not of this checkpoint" for name in sorted(extra)]
    limit = plan.budgets.max_size_bytes
    size = sum((folder / name).stat().st_size for name in expected if _holds_weights(folder / name))
    if limit is not None and plan.expected.size_bytes <= limit < size:
        wrong.append(f"the weight files hold {size} bytes, and the budget is {limit}")
    return Check("files", not wrong, "; ".join(wrong) or f"{len(expected)} files have their hashes")


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".gguf") and path.is_file()


def _tokenizer(plan: Plan, folder: Path) -> Check:
    try:
        same = hash_model(folder).tokenizer == plan.model.tokenizer_sha256
    except (OSError, ValueError) as error:
        return Check("tokenizer", False, f"config.json or a tokenizer file is unreadable: {error}")
    return Check("tokenizer", same, "the model's own" if same else "differs from the model's")


def _schemes(plan: Plan, checkpoint: Checkpoint, loaded: LoadedModel) -> Check:
    """Compare each module's scheme, as loaders resolve it, with the plan."""
    from advisor.formats.registry import get_format
    from advisor.search.assignment import assignment_of

    assigned = assignment_of(plan, loaded.linears)
    plain = not any(scheme.is_quantized for scheme in assigned.values())
    if checkpoint.format != ("safetensors" if plain else plan.scheme.format):
        return Check(
            "schemes",
            False,
            f"the format is {checkpoint.format}, the plan says {plan.scheme.format}",
        )
    stored = get_format(plan.scheme.format)
    wrong = []
    for name, scheme in assigned.items():
        expected = str(stored.storage_scheme(scheme)) if scheme.is_quantized else "bf16"
        found = str(checkpoint.modules.get(name, parse_scheme("bf16")))
        if name in plan.scheme.outer and checkpoint.format == "gguf":
            header = checkpoint.stored.headers.get(f"{name}.weight")
            found = "missing" if header is None else f"gguf-{header.dtype.lower()}"
        if found != expected:
            wrong.append(f"{name} is {found}, the plan says {expected}")
    unknown = checkpoint.modules.keys() - assigned.keys()
    wrong += [f"{name} is quantized, but no linear of the model" for name in sorted(unknown)]
    return Check("schemes", not wrong, listed(wrong) or f"all {len(assigned)} modules as planned")
