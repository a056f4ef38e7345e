"""``inspect``: what an already quantized checkpoint is."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError, VerificationError
from advisor.workflows.resolve import resolve_engine, resolve_hardware

if TYPE_CHECKING:
    from advisor.engines import Verdict


_WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True, slots=True)
class SchemeRow:
    """One scheme of a checkpoint: how many modules and weights have it, and what runs it."""

    name: str
    modules: int
    parameters: int
    verdict: Verdict


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
                    "kernel": f"{row.verdict.support}: {row.verdict.name or row.verdict.reason}",
                    "support": row.verdict.support,
                }
                for row in self.schemes
            ],
            "modules": self.modules,
            "faults": list(self.faults),
        }


def inspect(path: str | Path, *, gpu: str = "auto", engine: str = "auto") -> Inspection:
    """Examine a checkpoint: scheme of every module, size, faults, and what would run it.

    Args:
        path: Folder with config.json and safetensors.
        gpu: Device to judge kernels for.
        engine: Engine to judge kernels for.

    Raises:
        InputError: No such folder, or no checkpoint in it.
    """
    from advisor.engines import verdict
    from advisor.formats.read import read_checkpoint
    from advisor.predict.models import load_modelspec
    from advisor.predict.size import checkpoint_size
    from advisor.schemes import parse_scheme

    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"no checkpoint folder at {folder}.")
    hardware = resolve_hardware(gpu)
    engine_name = resolve_engine(engine, hardware)
    spec = load_modelspec(str(folder))
    files = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    try:
        checkpoint = read_checkpoint(folder)
    except VerificationError as error:
        return Inspection(
            folder, "unreadable", spec.architecture, files, 0.0, (), {}, (str(error),),
            engine_name, hardware.name,
        )  # fmt: skip
    parameters: Counter[str] = Counter()
    modules = {
        linear.name: str(checkpoint.modules.get(linear.name, "bf16")) for linear in spec.linears
    }
    for linear in spec.linears:
        parameters[modules[linear.name]] += linear.parameters
    rows = []
    for name, count in parameters.most_common():
        members = [linear for linear in spec.linears if modules[linear.name] == name]
        found = verdict(engine_name, parse_scheme(name), hardware, members)
        rows.append(SchemeRow(name, len(members), count, found))
    estimate = checkpoint_size(spec, checkpoint.modules, checkpoint.format)
    return Inspection(
        path=folder,
        format=checkpoint.format,
        architecture=spec.architecture,
        size_bytes=files,
        bits_per_weight=estimate.bits_per_weight,
        schemes=tuple(rows),
        modules=modules,
        faults=(),
        engine=engine_name,
        hardware=hardware.name,
    )
