"""``demo``: the whole journey on the small trained model that comes along."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.budgets import Budgets
from advisor.errors import AdvisorError, InputError
from advisor.workflows.progress import ProgressCallback, ignore_progress

if TYPE_CHECKING:
    from advisor.predict.answers import Recommendation
    from advisor.workflows.machine import ProfileReport
    from advisor.workflows.tuning import Tuning
    from advisor.workflows.verifying import VerifyReport

_SHARE_OF_16_BIT = 0.44
"""Size budget of the demonstration: too small for 4 bits everywhere, so that mixing pays."""
_MODEL = "tiny-llama"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The journey's stations."""

    machine: ProfileReport
    recommendation: Recommendation
    tuning: Tuning
    verification: VerifyReport
    files: dict[str, str]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether a plan was found and its checkpoint verified."""
        return self.tuning.feasible and self.verification.passed

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor demo --json``."""
        profile = self.machine.to_dict()
        lines = [
            f"{device['name']}: "
            + ", ".join(f"{label} {value}" for label, value in device["facts"][:4])
            for device in profile["devices"]
        ]
        return {
            "schema_version": 1,
            "passed": self.passed,
            "machine": [*profile["problems"], *lines],
            "recommendation": self.recommendation.to_dict(),
            "tuning": self.tuning.to_dict(),
            "verification": self.verification.to_dict(),
            "files": self.files,
            "seconds": self.seconds,
        }


def example_model() -> Path:
    """Return the folder of the small trained model, in the wheel or in a checkout.

    Raises:
        AdvisorError: The installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_examples" / _MODEL, package.parent / "examples" / _MODEL):
        if (folder / "config.json").is_file():
            return folder
    raise AdvisorError("the example model did not come with this installation; install it again.")


def demo(
    folder: str | Path = "advisor-demo", *, progress: ProgressCallback | None = None
) -> DemoResult:
    """Profile, recommend, tune, apply, verify and report on the example model.

    Args:
        folder: Where everything is put; must not hold a checkpoint already.
        progress: Called with events.

    Raises:
        InputError: The folder already holds a demonstration.
    """
    from advisor.workflows.advice import recommend
    from advisor.workflows.applying import apply
    from advisor.workflows.machine import profile
    from advisor.workflows.reporting import report
    from advisor.workflows.tuning import tune
    from advisor.workflows.verifying import verify

    start = time.monotonic()
    callback = progress or ignore_progress
    target = Path(folder)
    if (target / "quantized").exists():
        raise InputError(
            f"{target}/quantized exists already. Remove it, or give another -o FOLDER."
        )
    source = example_model()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    budgets = Budgets(max_size_bytes=round(size * _SHARE_OF_16_BIT))
    machine = profile()
    advice = recommend(str(source), engine="transformers", gpu="cpu", budgets=budgets, context=256)
    tuning = tune(
        source, gpu="cpu", engine="transformers", budgets=budgets, context=256,
        # The only kind of text that the small model knows.
        calibration=["builtin:calibration"],
        output=target / "plan.yaml", trials=40, progress=callback,
    )  # fmt: skip
    apply(target / "plan.yaml", target / "quantized", progress=callback)
    verification = verify(target / "plan.yaml", target / "quantized", progress=callback)
    report(target / "plan.yaml", target / "report.html")
    files = {
        "plan": str(target / "plan.yaml"),
        "checkpoint": str(target / "quantized"),
        "report": str(target / "report.html"),
    }
    return DemoResult(
        machine, advice, tuning, verification, files, seconds=time.monotonic() - start
    )
