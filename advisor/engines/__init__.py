"""Kernel rules of serving engines, and the verdicts that follow from them."""

from __future__ import annotations

from advisor.engines.options import (
    MixtureOptions,
    default_engine,
    fused_conflicts,
    mixture_options,
)
from advisor.engines.releases import engine_name
from advisor.engines.rules import EngineProfile, engine_names, load_engine
from advisor.engines.shapes import ModuleVerdict
from advisor.engines.verdict import (
    Rejection,
    Verdict,
    format_for,
    platform_of,
    verdict,
)

__all__ = [
    "EngineProfile",
    "MixtureOptions",
    "ModuleVerdict",
    "Rejection",
    "Verdict",
    "default_engine",
    "engine_name",
    "engine_names",
    "format_for",
    "fused_conflicts",
    "load_engine",
    "mixture_options",
    "platform_of",
    "verdict",
]
