"""Advisor: which quantization, on this GPU, for this model, within these limits.

The journey of the command line as functions: ``advisor.profile()``, ``advisor.recommend(...)``,
``advisor.tune(...)``, ``advisor.apply(...)``, ``advisor.verify(...)``. Each returns a typed object
whose ``to_dict()`` equals the document that the command prints with ``--json``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advisor.workflows import (
        apply,
        compare,
        demo,
        doctor,
        inspect,
        profile,
        recommend,
        tune,
        verify,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "apply",
    "compare",
    "demo",
    "doctor",
    "inspect",
    "profile",
    "recommend",
    "tune",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import the workflows only when one is used: ``import advisor`` stays light."""
    if name in __all__:
        return getattr(importlib.import_module("advisor.workflows"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
