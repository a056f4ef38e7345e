"""The journey: the only orchestrators. Each function mirrors a command of the same name.

Functions are imported when first used, so that advice never pays for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from advisor.workflows.progress import ProgressEvent

if TYPE_CHECKING:
    from advisor.workflows.advice import compare_gpus, predict, recommend
    from advisor.workflows.applying import apply
    from advisor.workflows.backend_runs import run_backend
    from advisor.workflows.catalogue import check_profiles, list_profiles, show_profile
    from advisor.workflows.comparing import compare
    from advisor.workflows.demonstration import demo
    from advisor.workflows.diagnosis import doctor
    from advisor.workflows.inspection import inspect
    from advisor.workflows.machine import profile
    from advisor.workflows.others import check_backend, install_backend, list_backends
    from advisor.workflows.reporting import report
    from advisor.workflows.tuning import tune
    from advisor.workflows.verifying import verify

_HOMES = {
    "apply": "applying",
    "check_backend": "others",
    "check_profiles": "catalogue",
    "compare": "comparing",
    "compare_gpus": "advice",
    "demo": "demonstration",
    "doctor": "diagnosis",
    "inspect": "inspection",
    "install_backend": "others",
    "list_backends": "others",
    "list_profiles": "catalogue",
    "predict": "advice",
    "profile": "machine",
    "recommend": "advice",
    "report": "reporting",
    "run_backend": "backend_runs",
    "show_profile": "catalogue",
    "tune": "tuning",
    "verify": "verifying",
}

__all__ = [
    "ProgressEvent",
    "apply",
    "check_backend",
    "check_profiles",
    "compare",
    "compare_gpus",
    "demo",
    "doctor",
    "inspect",
    "install_backend",
    "list_backends",
    "list_profiles",
    "predict",
    "profile",
    "recommend",
    "report",
    "run_backend",
    "show_profile",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds a workflow when it is first asked for."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"advisor.workflows.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
