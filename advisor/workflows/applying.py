"""``apply``: make the checkpoint that a plan describes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, join_errors
from advisor.plan.files import load_plan, save_plan
from advisor.plan.hashing import sha256_file
from advisor.predict.size import SHARD_BYTES
from advisor.workflows.checking import Checks
from advisor.workflows.computing import check_device_name, describe_device, device_of_plan
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage

if TYPE_CHECKING:
    import torch

    from advisor.calibration.mixing import Statistics
    from advisor.calibration.tokens import TokenSequences
    from advisor.models.load import LoadedModel
    from advisor.plan.schema import Plan
    from advisor.workflows.own_text import OwnText

PLAN_NAME = "advisor-plan.yaml"
"""The plan's copy inside a checkpoint, with the hash of every file."""

CARD_NAME = "README.md"
"""The model card inside a checkpoint."""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What was written.

    Attributes:
        plan_path: The plan, now with the hashes of the files.
        plan: Its content.
        output: The checkpoint's folder.
        size_bytes: Bytes of its weight files.
        files: Weight file to sha256.
        quantized_modules: Number of modules in fewer than 16 bits.
        warnings: What may make the result differ from the plan's.
        computed_on: Where it was computed; empty where another library made it.
    """

    plan_path: Path
    plan: Plan
    output: Path
    size_bytes: int
    files: dict[str, str]
    quantized_modules: int
    warnings: tuple[str, ...]
    computed_on: dict[str, Any] = field(default_factory=dict)

    @property
    def served(self) -> Path:
        """What the engine is given: the folder, or the GGUF file in it."""
        found = [name for name in self.files if name.endswith(".gguf")]
        return self.output / found[0] if found else self.output

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor apply --json``."""
        from advisor.report.card import serve_plan

        return {
            "schema_version": 1,
            "plan": str(self.plan_path),
            "output": str(self.output),
            "scheme": self.plan.scheme.name,
            "format": self.plan.scheme.format,
            "size_bytes": self.size_bytes,
            "files": self.files,
            "quantized_modules": self.quantized_modules,
            "warnings": list(self.warnings),
            "computed_on": self.computed_on or None,
            "serve": serve_plan(self.plan, str(self.served)),
        }


def apply(
    plan: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> ApplyResult:
    """Quantize as a plan says; the same plan gives byte-identical tensor files on one device.

    The statistics of the search are used where the cache still has them, and collected again from
    the plan's text and seed where it has not. A plan that names a backend has it make the
    checkpoint, and what that library does is as repeatable as it is. The plan file gets the hashes
    of the files, where it can be written; the checkpoint's copy of it has them in any case.

    Args:
        plan: The plan's file.
        output: Folder to create; must not exist or be empty.
        model: Where the 16-bit model is, if not where the plan says.
        max_shard_bytes: A checkpoint larger than this is split into files of at most this size.
        device: Where codes are computed, as for ``tune``; a plan's backend chooses for itself.
        progress: Called with events.

    Raises:
        InputError: The plan, the model or the text is not what it should be, the output exists, or
            the plan's engine could not load the checkpoint; all offenders are listed.
        BackendError: The plan's backend cannot run here, is not installed, or failed.
    """
    from advisor.formats.folder import atomic_folder, check_output, write_text
    from advisor.models.checkpoint import INDEX_FILE
    from advisor.models.device import computing
    from advisor.predict.models import load_modelspec
    from advisor.report.card import render_card
    from advisor.search.assignment import assignment_of
    from advisor.workflows.identity import check_model, device_warnings, version_warnings
    from advisor.workflows.resolve import planned_model_folder

    report = progress or ignore_progress
    plan_path, target = Path(plan), Path(output)
    content = load_plan(plan_path)
    check_output(target)
    check_device_name(device)
    folder = planned_model_folder(content.model, model)
    check_model(content, folder)
    warnings = check_loadable(content, folder)
    if content.unmet is not None:
        warnings += (f"the plan is not within its budgets, only nearest to them: {content.unmet}",)
    where: dict[str, Any] = {}
    # The checkpoint, its plan and its card appear together or not at all.
    with atomic_folder(target, computes=True) as whole:
        if content.backend is not None:
            from advisor.workflows.backend_runs import make_planned

            files, modules = make_planned(
                content, content.backend, plan_path, folder, whole, report
            )
        else:
            choice = device_of_plan(device, content, folder)
            where = describe_device(choice)
            warnings += device_warnings(content, choice.device)
            with computing(choice.device):
                files, modules = _make(
                    content, plan_path, folder, whole, max_shard_bytes, choice.device, report
                )
        chosen = assignment_of(content, load_modelspec(str(folder)).linears)
        written = ("config.json", INDEX_FILE)
        hashes = files | {
            name: sha256_file(whole / name) for name in written if (whole / name).is_file()
        }
        finished = content.model_copy(update={"outputs": hashes})
        save_plan(finished, whole / PLAN_NAME)
        sizes = {name: (whole / name).stat().st_size for name in files}
        card = render_card(finished, {name: str(scheme) for name, scheme in chosen.items()}, sizes)
        write_text(whole / CARD_NAME, card)
    try:
        save_plan(finished, plan_path)
    except InputError as error:
        # The work is done, and the checkpoint's own copy of the plan has the hashes.
        warnings += (f"{error} The hashes are in {target / PLAN_NAME} only.",)
    return ApplyResult(
        plan_path=plan_path,
        plan=finished,
        output=target,
        size_bytes=sum(sizes.values()),
        files=dict(files),
        quantized_modules=modules,
        warnings=(*warnings, *version_warnings(content)),
        computed_on=where,
    )


def check_loadable(plan: Plan, folder: Path) -> tuple[str, ...]:
    """Refuse, before any work, a checkpoint that its format or the plan's engine cannot take.

    Args:
        plan: What would be applied.
        folder: The 16-bit model.

    Returns:
        Why later releases of the engine will not load it.

    Raises:
        InputError: Lists every rule broken, with the number of modules that break it.
    """
    from advisor.formats.loaders import ends_problems, loading_problems, storing_problems
    from advisor.predict.models import load_modelspec
    from advisor.search.assignment import assignment_of, settings_of

    spec = load_modelspec(str(folder))
    checks = Checks()
    settings = checks.run(lambda: settings_of(plan))
    schemes = checks.run(lambda: assignment_of(plan, spec.linears))
    checks.settle()
    if settings is None or schemes is None:  # then it was refused
        raise InputError("the plan could not be read.")
    problems = storing_problems(
        plan.scheme.format, schemes, spec.linears, static_groups=settings.static_groups
    )
    heads = spec.text_config.get("num_attention_heads")
    refusals, warnings = loading_problems(
        plan.engine.name, plan.scheme.format, schemes, spec.linears,
        heads=heads if isinstance(heads, int) else None, devices=plan.hardware.count,
    )  # fmt: skip
    refusals += ends_problems(plan.engine.name, plan.scheme.format, schemes, spec)
    if problems + refusals:
        raise InputError(join_errors(problems + refusals))
    return tuple(warnings)


def _make(
    plan: Plan,
    plan_path: Path,
    folder: Path,
    target: Path,
    shard_bytes: int,
    device: torch.device,
    report: ProgressCallback,
) -> tuple[dict[str, str], int]:
    """Quantize and write; return sha256 by tensor file, and the number of quantized modules."""
    from advisor.formats.export import write_checkpoint
    from advisor.models.load import load_model
    from advisor.search.assignment import assignment_of, samples_of, settings_of
    from advisor.search.realise import realise
    from advisor.workflows.own_text import OwnText, keep_own_text

    loaded = load_model(folder, device=device)
    own = OwnText(loaded, report, plan_path)
    sequences, store = statistics(plan, loaded, own, report)
    realised = realise(
        loaded,
        assignment_of(plan, loaded.linears),
        settings_of(plan),
        store,
        samples=samples_of(plan),
        calibration=sequences,
        progress=stage(report, "Quantizing"),
    )
    files = write_checkpoint(
        folder,
        target,
        format=plan.scheme.format,
        weights=realised.weights,
        replaced=realised.replaced,
        progress=stage(report, "Writing"),
        shard_bytes=shard_bytes,
    )
    keep_own_text(sequences, target / PLAN_NAME)
    return dict(files), len(realised.weights)


def statistics(
    plan: Plan, loaded: LoadedModel, own: OwnText, progress: ProgressCallback
) -> tuple[TokenSequences | None, Statistics | None]:
    """Return the plan's calibration text and its statistics, collected again if they are lost."""
    if plan.calibration is None:
        return None, None
    from advisor.calibration.sources import collect, open_statistics
    from advisor.workflows.texts import redraw

    sequences = redraw(plan.calibration, loaded.tokenizer, "calibration", own)
    store = open_statistics(loaded, sequences, compact=bool(plan.calibration.compact))
    if not store.complete:
        collect(loaded, sequences, store, stage(progress, "Calibrating"))
    if not store.complete:
        raise InputError("the calibration statistics could not be completed; run apply again.")
    return sequences, store
