"""The search space: which choices a trial makes, which depend on which, and what to try first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from advisor.search.families import (
    BEST,
    ROTATABLE,
    USUAL_DAMPING,
    WEIGHT_METHODS,
    Family,
    clip_under,
    is_searchable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.schemes import Scheme

Choice = str | int | float | bool | None
_DAMPINGS = (0.05, USUAL_DAMPING, 0.5)
_MOST_UNIFORM_PRIORS = 4


class Suggester(Protocol):
    """The part of an Optuna trial that the space uses."""

    def suggest_categorical(self, name: str, choices: Sequence[Choice]) -> Choice:
        """Choose one of a few."""
        ...

    def suggest_float(self, name: str, low: float, high: float) -> float:
        """Choose a number in a closed interval."""
        ...


@dataclass(frozen=True, slots=True)
class Proposal:
    """What one trial proposes.

    Attributes:
        family: Settings that decide the scores.
        uniform: Storage of every module (``int4-g64``), or None for a mixture.
        target_bits: Average bits per weight that a mixture may spend, or None for uniform ones.
    """

    family: Family
    uniform: str | None
    target_bits: float | None


@dataclass(frozen=True, slots=True)
class Space:
    """All that may be chosen, for one engine and one set of statistics.

    Attributes:
        methods: Families' methods on offer.
        storages: Symmetric or not -> uniform storages, by rising size.
        clips: Range searches: of no method, of GPTQ, of any.
        dampings: GPTQ's dampings.
        ordered: Whether the engine runs GPTQ's act-order.
        samples: Prefixes of the calibration sequences, rising.
        low_bits: Bits per weight of the smallest mixture.
        high_bits: Bits per weight of the largest mixture that the size budget allows.
        mixes: Mixes of the calibration's sources.
        rotations: Of the residual stream; ``none`` first.
    """

    methods: tuple[str, ...]
    storages: dict[bool, tuple[str, ...]]
    clips: tuple[str, ...]
    dampings: tuple[float, ...]
    ordered: bool
    samples: tuple[int, ...]
    low_bits: float
    high_bits: float
    mixes: tuple[str, ...] = ("given",)
    rotations: tuple[str, ...] = ("none",)

    def to_dict(self) -> dict[str, object]:
        """Return the space by name; a study's identity contains it."""
        return {name: getattr(self, name) for name in self.__slots__}


def kernel_view(scheme: Scheme) -> tuple[object, ...]:
    """Return what kernels see of a scheme: everything but who chose its codes."""
    stored = scheme.weight, scheme.granularity, scheme.group_size, scheme.symmetric
    return *stored, scheme.activation


def storage_name(scheme: Scheme) -> str:
    """Return how a scheme stores weights, without the method: ``int4-g64``, ``int8-gch``."""
    if scheme.method in WEIGHT_METHODS and not is_searchable(scheme):
        return str(replace(scheme, method="rtn"))
    if not is_searchable(scheme):
        return str(scheme)
    group = "gch" if scheme.granularity == "channel" else f"g{scheme.group_size}"
    return f"{scheme.weight}-{group}"


def build_space(
    options: Sequence[Scheme],
    samples: Sequence[int],
    *,
    low_bits: float,
    high_bits: float,
    methods: Sequence[str] = (*WEIGHT_METHODS, BEST),
    mixes: Sequence[str] = ("given",),
    rotations: Sequence[str] = ("none",),
) -> Space:
    """Return the space of an engine's options.

    Args:
        options: What the engine mixes in one checkpoint.
        samples: Prefixes that the statistics hold.
        low_bits: Bits per weight of the smallest mixture.
        high_bits: Bits per weight of the largest mixture within the size budget.
        methods: Methods that may be chosen.
        mixes: Mixes of the calibration's sources, the given one first.
        rotations: That the model and the format allow, ``none`` first.
    """
    searchable = [option for option in options if is_searchable(option)]
    # Beside integers, other types are options of mixtures; uniform ones are measured unscored.
    own = [option for option in options if option.is_quantized and not searchable]
    storages: dict[bool, tuple[str, ...]] = {}
    for symmetric in (True, False):
        names = [storage_name(option) for option in searchable if option.symmetric == symmetric]
        if names:
            storages[symmetric] = tuple(dict.fromkeys(names))
    if not storages:
        storages = {True: ()}
    storages = {
        symmetric: names + tuple(storage_name(option) for option in own)
        for symmetric, names in storages.items()
    }
    if not searchable:
        known = ("gptq", "rtn") if any(o.method in WEIGHT_METHODS for o in own) else ("rtn",)
        known = ("gguf",) if any(option.method == "gguf" for option in own) else known
        methods = tuple(method for method in known if method in methods) or known
    return Space(
        methods=tuple(methods),
        storages=storages,
        clips=("none", "gptq", "mse") if searchable else ("none",),
        dampings=_DAMPINGS,
        ordered=any(option.activation_order for option in searchable),
        samples=tuple(samples),
        low_bits=low_bits,
        high_bits=max(high_bits, low_bits),
        mixes=tuple(mixes),
        rotations=tuple(rotations),
    )


def suggest(trial: Suggester, space: Space) -> Proposal:
    """Ask for one proposal; choices that an earlier one rules out are not asked for."""
    method = str(_choose(trial, "method", space.methods))
    is_mixture = _choose(trial, "allocation", ("mixture", "uniform")) == "mixture"
    symmetric = _grid_of_mixtures(method, space) if is_mixture else True
    if symmetric is not None:
        symmetric = bool(_choose(trial, "symmetric", tuple(space.storages)))
    clip = str(_choose(trial, "clip", space.clips))
    if method != BEST:
        clip = clip_under(method, clip)
    damping, ordered, static = USUAL_DAMPING, False, False
    if method in ("gptq", BEST):
        damping = float(_choose(trial, "damping", space.dampings) or USUAL_DAMPING)
        if space.ordered:
            ordered = bool(_choose(trial, "activation_order", (False, True)))
        if not ordered:
            static = bool(_choose(trial, "static_groups", (False, True)))
    samples: int | None = None
    mix = space.mixes[0]
    if _chooses_samples(method, clip):
        chosen = _choose(trial, "samples", space.samples)
        samples = None if chosen is None else int(chosen)
        mix = str(_choose(trial, "mix", space.mixes))
    rotation = space.rotations[0]
    if method in ROTATABLE:
        rotation = str(_choose(trial, "rotation", space.rotations))
    family = Family(method, symmetric, clip, damping, ordered, static, samples, mix, rotation)
    if not is_mixture:
        name = "uniform_symmetric" if symmetric else "uniform_asymmetric"
        return Proposal(family, str(_choose(trial, name, space.storages[bool(symmetric)])), None)
    bits = trial.suggest_float("target_bits", space.low_bits, space.high_bits)
    return Proposal(family, None, bits)


def _grid_of_mixtures(method: str, space: Space) -> bool | None:
    """Return the grid of a method's mixtures: None for either, module by module."""
    if method in ("gptq", BEST) and len(space.storages) > 1:
        return None
    return next(iter(space.storages))


def _chooses_samples(method: str, clip: str) -> bool:
    """Whether a trial chooses samples and their mix; GGUF's codes always use all of the text."""
    return method not in ("rtn", "gguf") or clip == "mse"


def _choose(trial: Suggester, name: str, choices: Sequence[Choice]) -> Choice:
    """Ask only where there is a choice."""
    return choices[0] if len(choices) == 1 else trial.suggest_categorical(name, choices)


def parameters_of(proposal: Proposal, space: Space) -> dict[str, Choice]:
    """Return the parameters that make :func:`suggest` return this proposal."""
    family = proposal.family
    wanted: dict[str, Choice] = {
        "method": family.method,
        "allocation": "mixture" if proposal.uniform is None else "uniform",
        "clip": family.clip,
    }
    if family.symmetric is not None:
        wanted["symmetric"] = family.symmetric
    if family.method in ("gptq", BEST):
        wanted["damping"] = family.damping
        if space.ordered:
            wanted["activation_order"] = family.activation_order
        if not family.activation_order:
            wanted["static_groups"] = family.static_groups
    if _chooses_samples(family.method, family.clip):
        wanted["samples"] = family.samples
        if len(space.mixes) > 1:
            wanted["mix"] = family.mix
    if family.method in ROTATABLE and len(space.rotations) > 1:
        wanted["rotation"] = family.rotation
    if proposal.uniform is None:
        wanted["target_bits"] = proposal.target_bits
    else:
        wanted["uniform_symmetric" if family.symmetric else "uniform_asymmetric"] = proposal.uniform
    return wanted


def usual_families(space: Space) -> list[Family]:
    """Return one family of each method, with all samples and its usual settings."""
    everything = space.samples[-1] if space.samples else None
    found = []
    for method in space.methods:
        samples = everything if _chooses_samples(method, "none") else None
        static = method in ("gptq", BEST)
        grid = _grid_of_mixtures(method, space)
        clip = "gptq" if "gptq" in space.clips else "none"
        clip = clip if method == BEST else clip_under(method, clip)
        found.append(Family(method, grid, clip, USUAL_DAMPING, False, static, samples))
    return found


def with_whole_ranges(families: Sequence[Family]) -> list[Family]:
    """Return GPTQ's families whose ranges are searched, without that."""
    return [replace(f, clip="none") for f in families if f.method == "gptq" and f.clip != "none"]


def priors(space: Space) -> list[Proposal]:
    """Return what an expert would try first: mixtures at the edge, then uniform candidates.

    Every method is tried with all samples and its usual settings as a mixture at the largest size
    allowed, GPTQ also with whole ranges, on every mix of the calibration's sources and rotated; the
    best-of-methods family also at a few smaller ones; the storages that exist as uniform
    candidates, largest first, for every method (GPTQ on every grid).

    Whether ranges are better searched depends on the model: of SmolLM2-135M predicted KL falls by
    0 to 40% (8 to 2 bits; the mixture's by 3%), of the small trained model it rises at 2 bits by a
    quarter to two fifths, and changes by -5 to +2% at 4 in groups of 64 or less.
    """
    usual = usual_families(space)
    families = list(usual)
    gptq = next((family for family in usual if family.method == "gptq"), None)
    if gptq is not None:
        families += with_whole_ranges(usual)
        families += [replace(gptq, mix=mix) for mix in space.mixes[1:]]
        families += [replace(gptq, rotation=rotation) for rotation in space.rotations[1:]]
    found = [Proposal(family, None, space.high_bits) for family in families]
    for family in usual:
        if family.method == BEST:
            continue
        for symmetric in space.storages if family.symmetric is None else (family.symmetric,):
            storages = [name for name in space.storages[symmetric] if name]
            found += [
                Proposal(replace(family, symmetric=symmetric), name, None)
                for name in storages[::-1][:_MOST_UNIFORM_PRIORS]
            ]
    best = [family for family in usual if family.method == BEST] or usual[:1]
    span = space.high_bits - space.low_bits
    if span > 0:
        found += [
            Proposal(family, None, space.low_bits + share * span)
            for family in best
            for share in (0.75, 0.5, 0.25, 0.0)
        ]
    return found
