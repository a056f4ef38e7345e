"""Kernel rules of serving engines: the schema of ``profiles/engines/*.yaml``, and its loader."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from advisor.engines.releases import check_release, named, split_engine
from advisor.errors import InputError, did_you_mean
from advisor.plan.data import data_files, data_folders
from advisor.plan.schema import Strict

if TYPE_CHECKING:
    from pathlib import Path

Support = Literal["native", "weight-only", "emulated", "none"]
Platform = Literal["cuda", "rocm", "xpu", "metal", "vulkan", "cpu"]


class Source(Strict):
    """Where a rule was read."""

    repo: str
    path: str
    commit: str | None = None

    def __str__(self) -> str:
        """Print as ``repo path@commit``."""
        return f"{self.repo} {self.path}" + (f"@{self.commit}" if self.commit else "")


class Conflict(Strict):
    """Documentation and code that say different things; both are kept."""

    documentation: str
    code: str
    decided_by: Literal["documentation", "code"]


class PlatformRule(Strict):
    """Devices that an engine starts on at all."""

    minimum_capability: int | None = None
    targets: tuple[str, ...] = ()
    """Compilation targets of GPUs that are not NVIDIA's (``gfx942``); empty = all."""
    instruction_sets: tuple[str, ...] = ()
    """CPUs: one of them is needed; empty = all CPUs."""
    instruction_sets_missing: tuple[str, ...] = ()
    source: str
    note: str | None = None


class Dated(Strict):
    """A rule that some releases have and others have not; absent = all have it."""

    since: str | None = None
    """First release that has it."""
    until: str | None = None
    """First release without it."""


class FormatRule(Dated):
    """Which checkpoint format carries a scheme; the first rule that fits decides."""

    format: str
    methods: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    granularities: tuple[str, ...] = ()
    symmetric: bool | None = None
    group_sizes: tuple[int, ...] = ()
    """-1 is one scale per output channel."""
    activation_order: bool | None = None
    """False: no groups of scattered inputs; with one scale per channel order does not matter."""
    activations: tuple[str | None, ...] | None = None
    moved: str | None = None
    """Where support went with release ``until``."""
    source: str | None = None


class KernelRule(Dated):
    """One kernel (or code path) of an engine and everything it asks of a module.

    An absent field asks nothing.
    """

    name: str
    support: Support
    platforms: tuple[Platform, ...]
    compute: Literal["16-bit", "int8", "fp8", "fp4", "fp32"] = "16-bit"
    """Arithmetic of the matrix product itself."""
    formats: tuple[str, ...]
    methods: tuple[str, ...] = ()
    weights: tuple[str, ...]
    granularities: tuple[str, ...] = ()
    group_sizes: tuple[int, ...] = ()
    """-1 is one scale per output channel."""
    group_multiple: int | None = None
    symmetric: bool | None = None
    symmetric_weights: tuple[str, ...] = ()
    """Weight types that must be symmetric although others need not (Marlin's int8)."""
    activation_order: bool | None = None
    activations: tuple[str | None, ...] = (None,)
    dtypes: tuple[str, ...] = ("float16", "bfloat16")
    minimum_capability: int | None = None
    maximum_capability: int | None = None
    above: str | None = None
    """What the engine does instead on newer GPUs than that."""
    capabilities: tuple[int, ...] = ()
    """Exact compute capabilities."""
    targets: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()
    """CPUs: one of them is needed."""
    in_multiple: int = 1
    out_multiple: int = 1
    refuses_experts: bool = False
    """Whether experts of a mixture must stay in 16 bits."""
    requires: tuple[str, ...] = ()
    """Optional packages: without a known installation the kernel is passed over."""
    source: str
    note: str | None = None
    experimental: bool = False
    """The engine itself calls it experimental: advised only where nothing else fits."""
    conflict: Conflict | None = None
    speed: str = "default"
    """Key of the speed coefficients."""


class Mixture(Strict):
    """Per-module schemes that one checkpoint may mix on a platform."""

    platforms: tuple[Platform, ...]
    format: str
    schemes: tuple[str, ...]
    source: str


class OuterRule(Dated):
    """Embeddings or heads that an engine reads quantized."""

    formats: tuple[str, ...]
    roles: tuple[Literal["embedding", "head"], ...]
    tied: bool = False
    """Whether also where one tensor is both."""
    methods: tuple[str, ...] = ()
    """Of the schemes that it takes; empty = all that the format holds."""
    rows_multiple: int = 1
    """The vocabulary must be a multiple of this."""
    source: str


class EngineProfile(Strict):
    """Everything known of one engine."""

    name: str
    title: str
    fuses_modules: bool
    """Whether q/k/v and gate/up run as one product and must share a scheme."""
    checked: str
    """Versions that the rules were read from."""
    releases: tuple[str, str] | None = None
    """Oldest and newest release that the rules tell apart; absent = they name none."""
    default_release: str | None = None
    """The release meant where none is named; absent = the newest."""
    release: str = ""
    """The release asked for; empty = the newest."""
    sources: dict[str, Source]
    platforms: dict[Platform, PlatformRule]
    formats: tuple[FormatRule, ...]
    kernels: tuple[KernelRule, ...]
    """In the order in which the engine tries them."""
    mixtures: tuple[Mixture, ...] = ()
    outer: tuple[OuterRule, ...] = ()
    """Quantized embeddings and heads; what no rule names stays in 16 bits."""
    serve: str
    """Command; ``{path}``, ``{context}``, ``{batch}``, ``{devices}`` and ``{dtype}`` stand open."""
    notes: tuple[str, ...] = ()
    unsupported: dict[str, str] = Field(default_factory=dict)
    """Method -> why this engine reads no checkpoint of it."""

    @model_validator(mode="after")
    def _sources_exist(self) -> EngineProfile:
        used = [*(k.source for k in self.kernels), *(p.source for p in self.platforms.values())]
        used += [f.source for f in self.formats if f.source is not None]
        used += [rule.source for rule in self.outer]
        used += [mixture.source for mixture in self.mixtures]
        missing = sorted({key for key in used if key not in self.sources})
        if missing:
            raise ValueError(f"sources are used but not listed: {', '.join(missing)}")
        return self

    def source(self, key: str) -> str:
        """Print a source by its key."""
        return str(self.sources[key])

    @property
    def label(self) -> str:
        """Title and release, as in ``vLLM 0.32``; the title alone where rules name no releases."""
        release = self.release or (self.releases[1] if self.releases else "")
        return f"{self.title} {release}".strip()


def read_yaml(path: Path) -> Any:
    """Read one YAML file with libyaml where it is there: ten times as fast as pure Python."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def engine_names() -> tuple[str, ...]:
    """Return the names of all engines, in alphabetical order."""
    return tuple(sorted({path.stem for path in data_files("engines")}))


def load_engine(engine: str) -> EngineProfile:
    """Return an engine's rules; a user's file of the same name replaces the shipped one.

    Args:
        engine: Name of the engine; ``name==release`` for a release that is not the newest.

    Raises:
        InputError: Unknown engine or release, or a file that breaks the schema.
    """
    files = _files(tuple((f, f.stat().st_mtime_ns) for f in data_folders("engines")))
    name, release = split_engine(engine)
    if name not in files:
        known = ", ".join(sorted(files))
        raise InputError(
            f"unknown engine {engine!r}: use one of {known} or auto.{did_you_mean(name, files)}"
        )
    profile = load_engine_file(files[name])
    if release:
        check_release(profile.title, profile.name, release, profile.releases or ())
        return _of_release(profile, release, named(name, release))
    if profile.default_release:
        return _of_release(profile, profile.default_release, name)
    return profile


@lru_cache(maxsize=8)
def _files(_folders: tuple[tuple[Path, int], ...]) -> dict[str, Path]:
    """Return the file of each engine; looked for again once a folder changes."""
    return {path.stem: path for path in data_files("engines")}


def _of_release(profile: EngineProfile, release: str, name: str) -> EngineProfile:
    return profile.model_copy(update={"name": name, "release": release})


def load_engine_file(path: Path) -> EngineProfile:
    """Read one engine's file.

    Raises:
        InputError: The file breaks the schema.
    """
    return _load_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _load_file(path: Path, _modified: int) -> EngineProfile:
    try:
        return EngineProfile.model_validate(read_yaml(path))
    except (yaml.YAMLError, ValidationError) as error:
        raise InputError(f"engine profile {path} breaks the schema: {error}") from error
