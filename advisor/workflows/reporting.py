"""``report``: the page of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advisor.errors import InputError
from advisor.plan.files import load_plan, write_atomically
from advisor.report.page import render_report


@dataclass(frozen=True, slots=True)
class ReportResult:
    """Where the page is."""

    output: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor report --json``."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            "bytes": self.output.stat().st_size,
        }


def report(plan: str | Path, output: str | Path = "report.html") -> ReportResult:
    """Write one self-contained HTML page from a plan.

    Raises:
        InputError: The plan is invalid or the output cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise InputError(
            f"--output must be a file, but {target} is a folder. Use {target}/report.html."
        )
    content = load_plan(Path(plan))
    write_atomically(target, render_report(content, _modules(content.model.id)))
    return ReportResult(target)


def _modules(model: str) -> tuple[str, ...]:
    """Return the model's linears; none where the model is not at hand any more."""
    from advisor.predict.models import load_modelspec

    try:
        return tuple(linear.name for linear in load_modelspec(model).linears)
    except InputError:
        return ()
