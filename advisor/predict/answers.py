"""What ``recommend`` and ``predict`` answer, and how it is written as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from advisor.engines.outer import OPTIONS
from advisor.plan.data import folders_of_option
from advisor.predict.explain import serve_command, tune_command, why, why_not
from advisor.predict.published import published_method

if TYPE_CHECKING:
    from advisor.budgets import Budgets
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.predict.candidate import Candidate, Workload
    from advisor.predict.ladder import Rung
    from advisor.predict.relax import Relaxation

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Recommendation:
    """Every candidate in rank order, and what to do next.

    Attributes:
        spec: The model.
        hardware: The device.
        engine: Name of the engine.
        budgets: The limits as the user gave them.
        workload: Context and batch.
        prefer: What broke ties.
        candidates: In rank order, the ruled-out ones at the end.
        tied: Feasible candidates that are no worse than the first, as far as is known.
        relaxation: Smallest changes that would do, where nothing fits.
        ladder: Largest context and batch of the first candidates.
        ends: Embedding and head, where they were to be quantized too.
        notes: What was understood otherwise than asked.
    """

    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    budgets: Budgets
    workload: Workload
    prefer: str
    candidates: tuple[Candidate, ...]
    tied: tuple[Candidate, ...]
    relaxation: tuple[Relaxation, ...] | None
    ladder: tuple[Rung, ...] = ()
    ends: tuple[OuterModule, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def recommended(self) -> Candidate | None:
        """The first feasible candidate, or None."""
        best = self.candidates[0] if self.candidates else None
        return best if best is not None and best.feasible else None

    @property
    def why(self) -> str | None:
        """Two sentences on the first place."""
        return why(self.candidates, self.tied, self.prefer)

    @property
    def serve(self) -> str | None:
        """Command that serves the recommended checkpoint."""
        best = self.recommended
        if best is None:
            return None
        path = "quantized/" if best.scheme.is_quantized else self.spec.id
        if best.format == "gguf":
            # What `advisor apply` writes, or as the name is that llama.cpp's own tools give.
            made = best.tunable and best.scheme.is_quantized and self.tune is not None
            name = PurePath(self.spec.id).name
            path = "quantized/model.gguf" if made else f"{name}-{best.scheme.weight}.gguf"
        return serve_command(
            self.engine, path, self.workload.context, self.workload.batch,
            devices=self.hardware.count, dtype=best.kernel.dtype,
        )  # fmt: skip

    @property
    def tune(self) -> str | None:
        """Command that measures; None where Advisor makes nothing that fits."""
        if not any(c.tunable for c in self.candidates if c.feasible and c.scheme.is_quantized):
            return None
        if published_method(self.spec):  # only the 16-bit original can be tuned, wherever it is
            return None
        options = sorted({OPTIONS[module.role] for module in self.ends})
        for folder in folders_of_option():
            options += ["--profiles", str(folder)]
        return tune_command(
            self.spec.id, self.hardware.argument, self.engine, self.budgets,
            self.workload.context, self.workload.batch, self.prefer, options,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``recommend --json``."""
        best = self.recommended
        relaxed = None
        if self.relaxation is not None:
            relaxed = [entry.to_dict() for entry in self.relaxation]
        rows = []
        for candidate in self.candidates:
            row = candidate.to_dict()
            row["why_not"] = why_not(candidate)
            rows.append(row)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": model_dict(self.spec),
            "hardware": self.hardware.to_dict(),
            "engine": self.engine,
            "budgets": self.budgets.to_dict(),
            "context": self.workload.context,
            "batch": self.workload.batch,
            "prefer": self.prefer,
            "recommended": None if best is None else best.name,
            "why": self.why,
            "ties": [candidate.name for candidate in self.tied],
            "candidates": rows,
            "relaxation": relaxed,
            "ladder": [rung.to_dict() for rung in self.ladder],
            "bound": None if best is None else best.speed.words or None,
            "serve": self.serve,
            "tune": self.tune,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """One scheme, predicted, feasible or not."""

    spec: ModelSpec
    hardware: HardwareProfile
    engine: str
    candidate: Candidate
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``predict --json``."""
        row = self.candidate.to_dict()
        row["why_not"] = why_not(self.candidate)
        row["notes"] = list(self.notes)
        return {
            "schema_version": SCHEMA_VERSION,
            "model": model_dict(self.spec),
            "hardware": self.hardware.to_dict(),
            "engine": self.engine,
            "candidate": row,
        }


def model_dict(spec: ModelSpec) -> dict[str, Any]:
    """Return the ``model`` object of the JSON documents."""
    return {
        "id": spec.id,
        "architecture": spec.architecture,
        "parameters": spec.parameters,
        "quantizable_parameters": spec.quantizable_parameters,
        "active_parameters": spec.active_parameters,
        "tied_embeddings": spec.tied_embeddings,
        "dtype": spec.dtype,
        "source": spec.source,
    }
