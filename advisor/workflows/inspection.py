"""``inspect``: what an already quantized checkpoint is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, VerificationError
from advisor.workflows.progress import ProgressCallback, ignore_progress, stage
from advisor.workflows.resolve import resolve_engine, resolve_hardware

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.engines import Verdict
    from advisor.formats.read import Checkpoint
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec

FAULTY = "faulty"
"""Stands for the scheme of a module whose tensors do not hold together."""
_WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True, slots=True)
class SchemeRow:
    """One scheme of a checkpoint: how many modules and weights have it, and what runs it."""

    name: str
    modules: int
    parameters: int
    verdict: Verdict | None

    @property
    def kernel(self) -> str:
        """The kernel in words."""
        if self.verdict is None:
            return "none: see the faults"
        return f"{self.verdict.support}: {self.verdict.name or self.verdict.reason}"


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: Its folder.
        format: Format of its quantized weights, ``safetensors`` for a 16-bit one.
        architecture: Model class.
        size_bytes: Bytes of its weight files.
        bits_per_weight: Average over the quantizable weights, scales and zero points included.
        schemes: Scheme by number of weights.
        modules: Module to scheme.
        faults: What is broken, a sentence each.
        engine: Engine that the kernels were judged for.
        hardware: Device that the kernels were judged for.
        refusals: Why the engine could not load it.
        warnings: Why later releases of the engine could not.
        outer: Scheme of embedding and head, by module path.
    """

    path: Path
    format: str
    architecture: str
    size_bytes: int
    bits_per_weight: float
    schemes: tuple[SchemeRow, ...]
    modules: dict[str, str]
    faults: tuple[str, ...]
    engine: str
    hardware: str
    refusals: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    outer: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor inspect --json``."""
        return {
            "schema_version": 1,
            "path": str(self.path),
            "format": self.format,
            "architecture": self.architecture,
            "size_bytes": self.size_bytes,
            "bits_per_weight": self.bits_per_weight,
            "engine": self.engine,
            "hardware": self.hardware,
            "schemes": [
                {
                    "name": row.name,
                    "modules": row.modules,
                    "parameters": row.parameters,
                    "kernel": row.kernel,
                    "support": row.verdict.support if row.verdict else "none",
                }
                for row in self.schemes
            ],
            "modules": self.modules,
            "outer": self.outer,
            "faults": list(self.faults),
            "refusals": list(self.refusals),
            "warnings": list(self.warnings),
        }


def inspect(
    path: str | Path,
    *,
    gpu: str = "auto",
    engine: str = "auto",
    progress: ProgressCallback | None = None,
) -> Inspection:
    """Examine a checkpoint: scheme of every module, size, faults, and what would run it.

    Args:
        path: Folder with config.json and safetensors, or with a GGUF file; or that file.
        gpu: Device to judge kernels for.
        engine: Engine to judge kernels and loading for; ``auto`` is the device's usual one, of a
            GGUF file llama.cpp.
        progress: Called with events.

    Raises:
        InputError: No such folder, or no checkpoint in it.
    """
    from advisor.formats.gguf_read import find_gguf
    from advisor.formats.health import gaps, value_faults
    from advisor.formats.read import read_checkpoint

    folder = Path(path)
    if not folder.is_dir() and find_gguf(folder) is None:
        raise InputError(f"no checkpoint folder at {folder}.")
    hardware = resolve_hardware(gpu)
    is_gguf = find_gguf(folder) is not None
    if is_gguf and engine.strip().lower() == "auto":
        engine = "llama.cpp"
    engine_name = resolve_engine(engine, hardware)
    spec = modelspec_of(folder)
    try:
        checkpoint = read_checkpoint(folder, allow_faults=True)
    except (VerificationError, InputError) as error:
        return Inspection(
            folder, "unreadable", spec.architecture, _weight_bytes(folder), 0.0, (), {},
            (str(error),), engine_name, hardware.name,
        )  # fmt: skip
    faults = list(checkpoint.problems)
    faults += gaps(checkpoint, spec.linears, spec.tensors)
    report = stage(progress or ignore_progress, "Reading")
    faults += value_faults(checkpoint, spec.linears, progress=report)
    modules = {linear.name: _scheme_name(linear.name, checkpoint) for linear in spec.linears}
    refusals, warnings = _loading(checkpoint, spec, engine_name, hardware.count)
    return Inspection(
        path=folder,
        format=checkpoint.format,
        architecture=spec.architecture,
        size_bytes=checkpoint.size_bytes,
        bits_per_weight=_bits_per_weight(checkpoint, spec),
        schemes=_rows(modules, spec, engine_name, hardware, checkpoint.format),
        modules=modules,
        faults=tuple(faults),
        engine=engine_name,
        hardware=hardware.name,
        refusals=tuple(refusals),
        warnings=tuple(warnings),
        outer=_outer(checkpoint, spec),
    )


def _outer(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, str]:
    """Return how embedding and head are stored; a tied model has one of both."""
    from advisor.modelspec.outer import outer_modules

    found = {}
    for module in outer_modules(spec):
        header = checkpoint.stored.headers.get(f"{module.name}.weight")
        if module.name in checkpoint.modules:
            found[module.name] = str(checkpoint.modules[module.name])
        elif header is not None:
            kind = header.dtype.lower()
            plain = kind in ("f32", "f16", "bf16")
            found[module.name] = kind if plain else f"{checkpoint.format}-{kind}"
    return found


def modelspec_of(path: Path) -> ModelSpec:
    """Describe the model from config.json alone, or from a GGUF file that stands alone.

    Not from the files' headers: what they hold is what is in question.
    """
    from advisor.formats.gguf_read import config_of_gguf, find_gguf
    from advisor.models.config_file import read_config
    from advisor.modelspec import build_modelspec

    file = find_gguf(path)
    if file is not None and not (path / "config.json").is_file():
        return build_modelspec(config_of_gguf(file), model_id=str(path), where=str(file))
    return build_modelspec(read_config(path), model_id=str(path), where=str(path / "config.json"))


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))


def _scheme_name(name: str, checkpoint: Checkpoint) -> str:
    """Return a linear's scheme; of one that is not stored as config.json says, ``faulty``."""
    if name in checkpoint.modules:
        return str(checkpoint.modules[name])
    return "bf16" if f"{name}.weight" in checkpoint.stored.headers and not any(
        problem.startswith((f"{name}:", f"{name} ")) for problem in checkpoint.problems
    ) else FAULTY  # fmt: skip


def _rows(
    modules: Mapping[str, str],
    spec: ModelSpec,
    engine: str,
    hardware: HardwareProfile,
    checkpoint_format: str,
) -> tuple[SchemeRow, ...]:
    """Return every scheme with its kernel, the one of most weights first."""
    from advisor.engines import verdict
    from advisor.schemes import parse_scheme

    parameters: Counter[str] = Counter()
    for linear in spec.linears:
        parameters[modules[linear.name]] += linear.parameters
    rows = []
    for name, count in parameters.most_common():
        members = [linear for linear in spec.linears if modules[linear.name] == name]
        found = None
        if name != FAULTY:
            scheme = parse_scheme(name)
            carried = checkpoint_format if scheme.is_quantized else None
            found = verdict(engine, scheme, hardware, members, checkpoint_format=carried)
        rows.append(SchemeRow(name, len(members), count, found))
    return tuple(rows)


def _loading(
    checkpoint: Checkpoint, spec: ModelSpec, engine: str, devices: int
) -> tuple[list[str], list[str]]:
    """Return why the engine could not load the checkpoint, or its later releases could not."""
    from advisor.formats.loaders import ends_problems, loading_problems

    heads = spec.text_config.get("num_attention_heads")
    refusals, warnings = loading_problems(
        engine, checkpoint.format, checkpoint.modules, spec.linears,
        heads=heads if isinstance(heads, int) else None, devices=devices,
    )  # fmt: skip
    return refusals + ends_problems(engine, checkpoint.format, checkpoint.modules, spec), warnings


def _bits_per_weight(checkpoint: Checkpoint, spec: ModelSpec) -> float:
    """Return the bits of the quantizable linears as stored, over their number of weights."""
    from advisor.formats.registry import get_format

    suffixes = dict.fromkeys((*get_format(checkpoint.format).SUFFIXES, "weight"))
    headers = checkpoint.stored.headers
    stored = sum(
        headers[f"{linear.name}.{suffix}"].size_bytes
        for linear in spec.linears
        for suffix in suffixes
        if f"{linear.name}.{suffix}" in headers
    )
    return 8 * stored / max(1, spec.quantizable_parameters)
