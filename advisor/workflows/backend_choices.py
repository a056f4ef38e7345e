"""Which candidates of a library are worth making for an engine, a device and a size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from advisor.backends.mixtures import OPTIONS, TARGET, average_bits
from advisor.backends.requests import check_request
from advisor.engines.verdict import verdict
from advisor.errors import AdvisorError
from advisor.formats.loaders import loading_problems
from advisor.predict.loss import predict_loss
from advisor.predict.size import checkpoint_size
from advisor.schemes import Scheme

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.backends.registry import Backend, Makes, Setting
    from advisor.hardware.profile import HardwareProfile
    from advisor.modelspec import ModelSpec
    from advisor.search.outside import Wanted

_GROUP_SIZES = (32, 64, 128)
_STEP = 0.001
"""Bits per weight: targets are rounded down to these."""
_WIDEST = 8


@dataclass(frozen=True, slots=True)
class Server:
    """What will serve a model.

    Attributes:
        spec: The model's tensors.
        hardware: The device.
        engine: Engine's name.
    """

    spec: ModelSpec
    hardware: HardwareProfile
    engine: str


def worth_making(
    backend: Backend, server: Server, wanted: Wanted
) -> tuple[list[tuple[Scheme, dict[str, Setting]]], str]:
    """Return the best that a library makes: uniform, and where it mixes by itself, a mixture.

    Args:
        backend: The library.
        server: What will serve the model.
        wanted: Size and speed.

    Returns:
        Schemes with the settings to ask for, and why there is no uniform one, or an empty string.
    """
    run = possible_schemes(backend, server)
    names = [linear.name for linear in server.spec.linears]
    possible = [row for row in run if wanted.is_fast(dict.fromkeys(names, row[0]), row[1])]
    found: list[tuple[Scheme, dict[str, Setting]]] = []
    why_not = ""
    if (uniform := best_uniform(possible, server, wanted.max_bytes)) is not None:
        found.append((uniform, {}))
    else:
        size = "any size" if wanted.max_bytes is None else f"{wanted.max_bytes:,} bytes"
        speed = ", and is as fast as was asked for" if len(possible) < len(run) else ""
        why_not = f"nothing that it makes has a kernel in {server.engine} and fits {size}{speed}"
    if (mixture := best_mixture(backend, possible, server, wanted.max_bytes)) is not None:
        found.append(mixture)
    return found, why_not


def possible_schemes(backend: Backend, server: Server) -> list[tuple[Scheme, str]]:
    """Return what a library makes of the model that the engine runs, each with its format."""
    return [
        (scheme, rule.format)
        for rule in backend.makes
        for scheme in schemes_of(rule)
        if _is_possible(backend, scheme, rule, server)
    ]


def _is_possible(backend: Backend, scheme: Scheme, rule: Makes, server: Server) -> bool:
    try:
        check_request(backend, scheme, server.spec.linears, {}, "auto")
    except AdvisorError:
        return False
    if rule.format == "safetensors":  # written back in 16 bits: saves nothing
        return False
    linears = server.spec.linears
    everywhere = {linear.name: scheme for linear in linears}
    if loading_problems(server.engine, rule.format, everywhere, linears)[0]:
        return False
    kernel = verdict(server.engine, scheme, server.hardware, linears, checkpoint_format=rule.format)
    return kernel.support in ("native", "weight-only") and not kernel.kept_16bit


def best_uniform(
    possible: Sequence[tuple[Scheme, str]], server: Server, max_bytes: int | None
) -> Scheme | None:
    """Return the scheme of least published loss within a size; None where nothing fits."""
    found = []
    for scheme, carried in possible:
        size = checkpoint_size(server.spec, scheme, carried).total_bytes
        if max_bytes is None or size <= max_bytes:
            found.append((predict_loss(server.spec, scheme).expected, size, str(scheme), scheme))
    return min(found)[-1] if found else None


def best_mixture(
    backend: Backend,
    possible: Sequence[tuple[Scheme, str]],
    server: Server,
    max_bytes: int | None,
) -> tuple[Scheme, dict[str, Setting]] | None:
    """Return what to ask for where a library chooses schemes module by module itself.

    It may choose, for each width that the engine runs, the largest and the smallest groups (of 8
    bits the largest alone), and is to spend the bits that the size allows: what files hold beside
    weights, scales and zero points is the same in all of them but for a little, of which the most
    is taken.

    Args:
        backend: The library.
        possible: What it makes that the engine runs.
        server: What will serve it.
        max_bytes: Size of the largest candidate.

    Returns:
        The scheme and the settings; None where the library makes no mixtures, the engine reads none
        in its format, there is no size to aim at, or a uniform scheme is all that the size allows.
    """
    if TARGET not in backend.settings or max_bytes is None:
        return None
    linears = server.spec.linears
    options = _ends(possible, server)
    if len(options) < 2 or not _reads_mixtures(options, server):
        return None
    weights = sum(linear.parameters for linear in linears)
    rest = max(
        checkpoint_size(server.spec, scheme, carried).total_bytes
        - average_bits(scheme, linears) * weights / 8
        for scheme, carried in options
    )
    target = math.floor((max_bytes - rest) * 8 / weights / _STEP) * _STEP
    bits = {scheme: average_bits(scheme, linears) for scheme, _ in options}
    if not min(bits.values()) < target < max(bits.values()):
        return None
    scheme = max((one for one in bits if bits[one] <= target), key=lambda one: bits[one])
    others = [str(one).removeprefix(f"{one.method}-") for one in bits if one != scheme]
    return scheme, {TARGET: round(target, 3), OPTIONS: ",".join(others)}


def _ends(possible: Sequence[tuple[Scheme, str]], server: Server) -> list[tuple[Scheme, str]]:
    """Return the symmetric schemes of each width that a library may mix, of one method."""
    linears = server.spec.linears
    symmetric = [row for row in possible if row[0].is_integer and row[0].symmetric]
    grouped = [row for row in symmetric if row[0].granularity == "group"] or symmetric
    widths: dict[str, list[tuple[Scheme, str]]] = {}
    for row in sorted(grouped, key=lambda row: (average_bits(row[0], linears), str(row[0]))):
        if (row[1], row[0].method) == (grouped[0][1], grouped[0][0].method):
            widths.setdefault(row[0].weight, []).append(row)
    ends = [
        (rows[0], rows[-1] if rows[0][0].bits < _WIDEST else rows[0]) for rows in widths.values()
    ]
    return [row for pair in ends for row in dict.fromkeys(pair)]


def _reads_mixtures(options: Sequence[tuple[Scheme, str]], server: Server) -> bool:
    """Whether the engine's loader takes different schemes in products that it does not fuse."""
    (first, carried), (second, _) = options[0], options[-1]
    linears = server.spec.linears
    chosen = {
        linear.name: first if linear.fused_group == linears[0].fused_group else second
        for linear in linears
    }
    return not loading_problems(server.engine, carried, chosen, linears)[0]


def schemes_of(rule: Makes) -> list[Scheme]:
    """Return the uniform schemes of a rule that are worth a look, with usual group sizes."""
    found = []
    sizes = {"group": _GROUP_SIZES, "channel": (-1,)}
    for weight, granularity, symmetric, activation in itertools.product(
        rule.weights, rule.granularities, rule.symmetric, rule.activations
    ):
        for size in sizes.get(granularity, (None,)):
            doubles = (False, True) if rule.double_quantization else (False,)
            found += [
                Scheme(
                    rule.method,
                    weight,
                    granularity=granularity,
                    group_size=size,
                    symmetric=symmetric,
                    activation=activation,
                    double_quantization=double,
                )
                for double in doubles
            ]
    return found
