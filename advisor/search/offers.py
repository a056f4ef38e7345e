"""Uniform candidates of no family: other formats, tables of values, quantized activations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.engines.outer import ends_taking
from advisor.engines.verdict import verdict
from advisor.errors import AdvisorError
from advisor.formats.layouts import engine_problems, is_written, layout_problems
from advisor.formats.loaders import loading_problems
from advisor.formats.registry import format_names
from advisor.methods.registry import method_names
from advisor.predict.candidate import SCHEME_NAMES
from advisor.predict.loss import predict_loss
from advisor.predict.size import checkpoint_size
from advisor.schemes import Scheme, parse_scheme
from advisor.search.families import TABLE_METHODS, Family, is_measured_alone
from advisor.search.mixture import Mixture
from advisor.search.scores import fits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.engines.options import MixtureOptions
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.modelspec.outer import OuterModule
    from advisor.search.finalists import Finalist

_OTHER_WAYS = ("gguf", "hqq")
"""GGUF needs more than the linears' codes: the embedding quantized. HQQ's checkpoints are read by
its own library; the engines that know the method quantize while they load 16-bit weights.
"""
COMPETITIVE = 6.0
"""A leader's published loss over the least one at most. On SmolLM2 that of SmoothQuant int8 is five
times that of FP8, and its measured KL half of it (README); NVFP4 and MXFP4 are beyond."""
SIBLING_REACH = 1.5
"""How many times the best KL scales per token may cost for calibrated ones to be tried."""
_STATIC = (
    "rtn-fp8-gch-afp8-static", "rtn-fp8-gtensor-afp8-static",
    "smoothquant-int8-gch-sym-aint8-static",
)  # fmt: skip
"""Inputs with calibrated scales: for engines whose kernels take them."""


def uniform_offers(
    spec: ModelSpec,
    linears: Sequence[LinearSpec],
    hardware: HardwareProfile,
    engine: str,
    offered: MixtureOptions,
    ends: Sequence[OuterModule] = (),
) -> list[Mixture]:
    """Return one candidate per kind (method and activations), least published loss first.

    Any method of the registry takes part whose checkpoint Advisor writes and the engine runs with
    a kernel of its own on the device. Integers that the families hold already are left out, as
    is what a module does not fit. They have no score: only measuring tells.

    Args:
        spec: The model's tensors.
        linears: Its quantizable modules.
        hardware: The device.
        engine: Name of the engine.
        offered: What one checkpoint may mix; its schemes with quantized activations come too.
        ends: Embedding and head that take the scheme too where the engine reads that.

    Returns:
        Candidates, several sizes of a kind among them; see :func:`best_of_kinds`.
    """
    names = [parse_scheme(name) for name in (*SCHEME_NAMES, *_STATIC)]
    found: list[tuple[float, Mixture]] = []
    for scheme in dict.fromkeys([*offered.schemes, *names]):
        if not _is_new(scheme) or not all(fits(scheme, linear) for linear in linears):
            continue
        carried = _format(scheme, linears, hardware, engine, offered)
        assignment = {linear.name: scheme for linear in linears}
        if carried is None or not is_written(spec.architecture, carried):
            continue
        if _unread(spec, linears, carried, engine, assignment):
            continue
        taking = ends_taking(scheme, hardware, engine, carried, ends)
        assignment |= dict.fromkeys(taking, scheme)
        try:
            size = checkpoint_size(spec, assignment, carried)
        except AdvisorError:  # the format has no way to store the scheme for these shapes
            continue
        clip = "mse" if scheme.method in ("gptq", *TABLE_METHODS) else "none"
        family = Family(scheme.method, scheme.symmetric is not False, clip)
        loss = predict_loss(spec, scheme).expected
        mixture = Mixture(
            str(scheme), family, assignment, size.total_bytes, size.bits_per_weight, 0.0, carried,
            published_loss=loss,
        )  # fmt: skip
        found.append((loss, mixture))
    found.sort(key=lambda row: (row[0], row[1].size_bytes, row[1].name))
    return [mixture for _, mixture in found]


def _unread(
    spec: ModelSpec,
    linears: Sequence[LinearSpec],
    carried: str,
    engine: str,
    assignment: Mapping[str, Scheme],
) -> list[str]:
    """Return why loaders do not read such a checkpoint of this model; empty where they do."""
    found = engine_problems(spec.architecture, carried, engine)
    found += layout_problems(spec.config, carried, assignment)
    return found + loading_problems(engine, carried, assignment, linears)[0]


def best_of_kinds(offers: Sequence[Mixture], max_bytes: int) -> list[Mixture]:
    """Return the first of each kind within a size; a kind is a method and its activations.

    Calibrated input scales come last: what they save is the search for scales at run time, and at
    the same published loss those found per token are seldom worse (see :func:`worth_measuring`).
    """
    kinds: dict[tuple[str, str | None, bool], Mixture] = {}
    for mixture in offers:
        scheme = next(iter(mixture.assignment.values()))
        if mixture.size_bytes <= max_bytes:
            kind = (scheme.method, scheme.activation, scheme.static_activation)
            kinds.setdefault(kind, mixture)
    static = {kind: mixture for kind, mixture in kinds.items() if kind[2]}
    return [*(kinds[kind] for kind in kinds if kind not in static), *static.values()]


def worth_measuring(offers: Sequence[Mixture], max_bytes: int, most: int) -> list[Mixture]:
    """Return which candidates to measure: the leader of each family that may win, then others.

    A family is how inputs are treated: as they are, rounded per token, or with calibrated scales,
    in each type. What a type costs a model is not known before it is measured, and families differ
    by more than methods within one do, so each has its leader (the least published loss) measured,
    unless that loss is over :data:`COMPETITIVE` times the least: calibrated scales too, which rank
    behind those found per token at the same published loss and so were hardly ever among the first
    few. Other candidates fill up to ``most``. A hopeless measurement ends early, so that a leader
    in vain costs a few sequences.

    Args:
        offers: Least published loss first.
        max_bytes: Size limit.
        most: Candidates to measure where fewer families compete.

    Returns:
        In the order of :func:`best_of_kinds`: calibrated scales last.
    """
    kinds = best_of_kinds(offers, max_bytes)
    leaders: dict[tuple[str | None, bool], Mixture] = {}
    for mixture in kinds:
        leaders.setdefault(family_of_inputs(mixture), mixture)
    least = min((mixture.published_loss or 0.0 for mixture in kinds), default=0.0)
    chosen = [m for m in leaders.values() if (m.published_loss or 0.0) <= COMPETITIVE * least]
    for mixture in kinds:
        if len(chosen) < most and mixture not in chosen:
            chosen.append(mixture)
    return [mixture for mixture in kinds if mixture in chosen]


def family_of_inputs(mixture: Mixture) -> tuple[str | None, bool]:
    """Return the type that inputs are rounded to, and whether with calibrated scales."""
    scheme = next(iter(mixture.assignment.values()))
    return scheme.activation, scheme.static_activation


def beaten_already(mixture: Mixture, finalists: Sequence[Finalist]) -> bool:
    """Whether calibrated input scales were beaten in the guise of scales per token.

    They do what those do with less freedom, so that where the same type of inputs was measured and
    cost more than :data:`SIBLING_REACH` times the best, there is nothing to learn.

    Args:
        mixture: What may be measured.
        finalists: What was.
    """
    kind, static = family_of_inputs(mixture)
    siblings = [f for f in finalists if family_of_inputs(f.mixture) == (kind, False)]
    if not static or not siblings:
        return False
    best = min(finalist.measured_kl for finalist in siblings)
    return best > SIBLING_REACH * min(finalist.measured_kl for finalist in finalists)


def _is_new(scheme: Scheme) -> bool:
    """Whether Advisor makes the scheme and it is no family's own uniform candidate."""
    if not is_measured_alone(scheme) or scheme.method in _OTHER_WAYS:
        return False
    return scheme.method in method_names()


def _format(
    scheme: Scheme,
    linears: Sequence[LinearSpec],
    hardware: HardwareProfile,
    engine: str,
    offered: MixtureOptions,
) -> str | None:
    """Return the format of a checkpoint that has a kernel for every module, or None."""
    asked = offered.format if scheme in offered.schemes else None
    found = verdict(engine, scheme, hardware, linears, checkpoint_format=asked)
    carried = asked or found.format
    if found.support not in ("native", "weight-only") or found.kept_16bit:
        return None
    if found.support == "weight-only" and scheme.activation and scheme.weight in SCHEME_NAMES:
        return None  # its inputs stay in 16 bits here, as those of plain nvfp4 do
    return carried if carried in format_names() else None
