"""What did not get the usual treatment, for the plan: odd shapes, rarely used experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advisor.calibration.coverage import expert_coverage
from advisor.engines.options import mixture_options
from advisor.errors import InputError
from advisor.plan.schema import ExpertCoverage, Fallback
from advisor.search.scores import fits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advisor.calibration.mixing import Statistics
    from advisor.engines.options import MixtureOptions
    from advisor.hardware.profile import HardwareProfile
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme


def shape_fallbacks(
    engine: str,
    hardware: HardwareProfile,
    linears: Sequence[LinearSpec],
    offered: MixtureOptions,
    assignment: Mapping[str, Scheme],
) -> tuple[Fallback, ...]:
    """Return the modules that groups or blocks do not divide, by what they got instead.

    Args:
        engine: Name of the engine.
        hardware: The device.
        linears: The model's modules.
        offered: What was offered for this model; schemes that no module fits are not among it.
        assignment: The answer.
    """
    try:
        every = mixture_options(engine, hardware).schemes
    except InputError:  # it mixes nothing: what was offered is all
        every = ()
    options = [s for s in (*offered.schemes, *every) if s.is_quantized and s.activation is None]
    grouped = [s for s in options if s.granularity == "group" and s.group_size]
    sizes = ", ".join(map(str, sorted({int(s.group_size or 0) for s in grouped})))
    found: dict[tuple[str, str], list[str]] = {}
    for linear in linears:
        scheme = assignment[linear.name]
        reason = None
        if not scheme.is_quantized and not any(_takes(offered, s, linear) for s in options):
            shape = f"{linear.out_features}x{linear.in_features}"
            reason = f"no offered scheme takes {shape}"
            if linear.is_expert:
                reason = f"no kernel of {engine} on {hardware.name} runs experts of {shape}"
            if all(option.method == "gguf" for option in options):
                reason = f"GGUF blocks of 32 do not divide in_features={linear.in_features}"
        elif (
            grouped
            and scheme.is_integer
            and scheme.activation is None
            and not any(fits(option, linear) for option in grouped)
            and not (scheme.granularity == "group" and fits(scheme, linear))
        ):
            reason = f"no offered group size ({sizes}) divides in_features={linear.in_features}"
        if reason is not None:
            found.setdefault((reason, str(scheme)), []).append(linear.name)
    return tuple(
        Fallback(modules=len(names), first=names[0], scheme=scheme, reason=reason)
        for (reason, scheme), names in found.items()
    )


def _takes(offered: MixtureOptions, scheme: Scheme, linear: LinearSpec) -> bool:
    """Whether a scheme's groups divide a module and a kernel runs it."""
    return fits(scheme, linear) and linear.name not in offered.unfit.get(scheme, frozenset())


def coverage_row(
    loaded: LoadedModel, store: Statistics, samples: int | None
) -> ExpertCoverage | None:
    """Return how many calibration tokens each expert saw, as a plan holds it.

    Args:
        loaded: The 16-bit model.
        store: Its statistics; nothing is said where they are not complete.
        samples: Calibration sequences that the answer's codes use; None for all.
    """
    if not any(linear.is_expert for linear in loaded.linears):
        return None
    found = expert_coverage(store, loaded.linears, samples) if store.complete else None
    if found is None:
        return None
    return ExpertCoverage(
        experts=len(found.counts),
        unseen=found.unseen,
        helped=found.helped,
        fewest_tokens=min(found.counts),
        median_tokens=found.median,
        layers={path: " ".join(map(str, counts)) for path, counts in found.layers.items()},
    )


def nothing_fits(offered: MixtureOptions) -> str:
    """Say of every scheme why it does not fit."""
    whys: dict[str, list[str]] = {}
    for scheme, reason in offered.ruled_out:
        whys.setdefault(reason, []).append(str(scheme))
    listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in whys.items())
    return (
        f"the engine offers no scheme in format {offered.format!r} that fits this "
        f"model: choose another --engine{f' ({listed})' if listed else ''}."
    )
