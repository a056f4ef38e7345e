"""What a search may choose from: what the engine mixes, or else the one scheme that it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from advisor.engines.options import MixtureOptions, mixture_options
from advisor.engines.verdict import verdict
from advisor.errors import InputError
from advisor.formats.layouts import engine_problems, is_written, layout_problems
from advisor.formats.loaders import loading_problems
from advisor.formats.registry import format_names
from advisor.methods.registry import method_names
from advisor.predict.candidate import SCHEME_NAMES
from advisor.predict.loss import predict_loss
from advisor.schemes import BF16, Scheme, parse_scheme
from advisor.search.fallbacks import nothing_fits
from advisor.search.scores import fits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import LinearSpec, ModelSpec

_BLOCKS = ("rtn-fp8-b128-afp8",)
"""Where nothing else runs: FP8 without a kernel for scales per channel."""


def search_options(
    engine: str, hardware: HardwareProfile, spec: ModelSpec, linears: Sequence[LinearSpec]
) -> MixtureOptions:
    """Return the per-module choices of a search.

    Where the engine mixes nothing on the device, or has a kernel for none of what it mixes, but
    runs some uniform checkpoint that Advisor writes, its scheme of least published loss is the only
    one beside 16 bits: any format can leave modules as they are. Other uniform candidates are
    measured beside it (:mod:`advisor.search.offers`).

    Args:
        engine: Name of the engine.
        hardware: The device.
        spec: The model's tensors.
        linears: Its quantizable modules.

    Raises:
        InputError: The engine runs nothing that Advisor writes of this model; says why.
    """
    refusal = ""
    offered = MixtureOptions("", ())
    try:
        offered = _storable(spec, mixture_options(engine, hardware, linears))
    except InputError as error:
        refusal = str(error)
    if any(scheme.is_quantized for scheme in offered.schemes):
        return offered
    for names in (SCHEME_NAMES, _BLOCKS):
        runs = [
            (predict_loss(spec, scheme).expected, number, scheme, carried)
            for number, scheme in enumerate(map(parse_scheme, names))
            if (carried := _carried(engine, hardware, spec, linears, scheme)) is not None
        ]
        if runs:
            _, _, scheme, carried = min(runs)
            return replace(offered, format=carried, schemes=(scheme, BF16), unfit={})
    raise InputError(f"{refusal or nothing_fits(offered)} {_way_out(engine)}".strip())


def _storable(spec: ModelSpec, offered: MixtureOptions) -> MixtureOptions:
    """Return the options that loaders read of this architecture; all of them if they read none."""
    kept = tuple(
        scheme
        for scheme in offered.schemes
        if not scheme.is_quantized
        or not layout_problems(
            spec.config, offered.format, dict.fromkeys((m.name for m in spec.linears), scheme)
        )
    )
    read = any(scheme.is_quantized for scheme in kept)
    return replace(offered, schemes=kept) if read else offered


def _carried(
    engine: str,
    hardware: HardwareProfile,
    spec: ModelSpec,
    linears: Sequence[LinearSpec],
    scheme: Scheme,
) -> str | None:
    """Return the format of a uniform checkpoint that Advisor writes and the engine runs."""
    if not scheme.is_quantized or scheme.method not in method_names():
        return None
    if not all(fits(scheme, linear) for linear in linears):
        return None
    found = verdict(engine, scheme, hardware, linears)
    if found.support not in ("native", "weight-only") or found.kept_16bit:
        return None
    carried = found.format
    if carried not in format_names() or carried in ("gguf", "hqq"):
        return None
    assignment = {linear.name: scheme for linear in linears}
    unread = engine_problems(spec.architecture, carried, engine)
    unread += layout_problems(spec.config, carried, assignment)
    unread += loading_problems(engine, carried, assignment, linears)[0]
    return None if unread or not is_written(spec.architecture, carried) else carried


def _way_out(engine: str) -> str:
    """Say what still answers for an engine whose checkpoints Advisor does not write."""
    return (
        f"`advisor recommend --engine {engine}` says what would suit it all the same, made by the "
        "engine's own tools."
    )
