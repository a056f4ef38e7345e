"""Time as a limit of mixtures: what decodes fast enough, where arithmetic decides and not bytes.

A decode step waits for the larger of two: reading weights, and multiplying. The first falls with
the bytes, so that a speed budget is a size budget there (:mod:`advisor.search.limits`). The second
depends on the type that a kernel multiplies in: at large batches weight-only schemes, which
multiply in 16 bits, gain nothing, and what rounds its inputs (FP8, W8A8, NVFP4 under NVFP4 inputs)
does. A mixture's step multiplies as long as its modules do, each by its share of the weights: one
more sum that a limit can be put on.

Where only bytes and quality count, rounding inputs costs quality and saves nothing over a
weight-only scheme of as many bits; it is no option then.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from advisor.engines.verdict import Verdict, verdict
from advisor.errors import AdvisorError
from advisor.predict.decode_step import Step, decode_step
from advisor.predict.ranking import PREFILL_WEIGHT
from advisor.predict.size import checkpoint_size
from advisor.predict.speed import predict_speed
from advisor.schemes import BF16, Scheme, parse_scheme
from advisor.search.allocation import Allocation, Option

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.engines.options import MixtureOptions
    from advisor.modelspec import LinearSpec, ModelSpec
    from advisor.search.allocation import Groups
    from advisor.search.planning import Task

_GAIN = 1.1
"""How many times as fast serving must be for rounded inputs to be preferred; by less, kernels
differ in what they cost the host, and predictions by more than that."""
_MOST_SOLVED = 12
"""Prices of time that are tried."""


@dataclass(frozen=True, slots=True)
class Pace:
    """A limit on what a step spends on arithmetic and everything fixed.

    Attributes:
        seconds: Of a step whose linears all have the scheme.
        shares: Module path to its share of the linears' weights.
        limit: Seconds.
    """

    seconds: Mapping[Scheme, float]
    shares: Mapping[str, float]
    limit: float

    def of(self, assignment: Mapping[str, Scheme]) -> float:
        """Return the seconds of a mixture's step; modules without a share cost none."""
        return sum(
            self.shares[name] * self._each(scheme)
            for name, scheme in assignment.items()
            if name in self.shares
        )

    def of_groups(
        self, groups: Groups, members: Mapping[str, Sequence[LinearSpec]]
    ) -> dict[str, dict[str, float]]:
        """Return the seconds of every option of every group.

        Args:
            groups: Of a knapsack; embedding and head, which have no linears, cost none.
            members: The linears of each.
        """
        rates = {
            option.name: self._each(parse_scheme(option.name))
            for options in groups.values()
            for option in options
        }
        found: dict[str, dict[str, float]] = {}
        for key, options in groups.items():
            share = sum(self.shares[linear.name] for linear in members.get(key, ()))
            found[key] = {option.name: share * rates[option.name] for option in options}
        return found

    def keeps(self, assignment: Mapping[str, Scheme]) -> bool:
        """Whether a mixture is fast enough."""
        return self.of(assignment) <= self.limit * (1 + 1e-9)

    def _each(self, scheme: Scheme) -> float:
        """Return a scheme's seconds, whoever chose its codes; the slowest where it is unknown."""
        found = [s for known, s in self.seconds.items() if _runs_alike(known, scheme)]
        return found[0] if found else max(self.seconds.values())


def _runs_alike(one: Scheme, other: Scheme) -> bool:
    """Whether kernels see no difference between two schemes."""
    return (one.weight, one.granularity, one.activation) == (
        other.weight, other.granularity, other.activation
    )  # fmt: skip


def in_time(task: Task, offered: MixtureOptions, prefer: str) -> tuple[MixtureOptions, Pace | None]:
    """Return the options that a search should have, and its limit on time where there is one.

    Args:
        task: Model, hardware, engine, budgets, batch and context.
        offered: What the engine mixes in one checkpoint.
        prefer: With ``speed``, weight-only options are left out where decoding and reading prompts
            (weighed as by :mod:`advisor.predict.ranking`) are really faster with others, and a
            checkpoint of these is small enough.
    """
    steps = _steps(task, offered)
    wanted = task.budgets.min_tokens_per_s
    if wanted is not None and steps:
        found = {scheme: step.arithmetic for scheme, step in steps.items()}
        limit = task.batch / wanted
        fastest = min(steps, key=lambda scheme: steps[scheme].seconds)
        if limit < min(found.values()) and fastest.activation:  # nothing keeps it; be nearest
            limit = found[fastest]
        if min(found.values()) <= limit < max(found.values()):
            parameters = max(1, task.spec.quantizable_parameters)
            shares = {linear.name: linear.parameters / parameters for linear in task.spec.linears}
            return offered, Pace(found, shares, limit)
    quick = _quick(task, offered) if prefer == "speed" else None
    if quick is not None:
        return quick, None
    plain = {s.bits for s in offered.schemes if s.activation is None}
    kept = tuple(s for s in offered.schemes if s.activation is None or s.bits not in plain)
    return replace(offered, schemes=kept), None


def is_fast(
    task: Task,
    offered: MixtureOptions,
    pace: Pace | None,
    assignment: Mapping[str, Scheme],
    carried: str | None,
) -> bool:
    """Whether a candidate from elsewhere is as fast as what the search may mix.

    Args:
        task: Model, hardware and engine.
        offered: The options that :func:`in_time` left.
        pace: The limit on time, where there is one.
        assignment: The candidate's modules, and their schemes.
        carried: Format of its checkpoint; None for the one that the engine takes by itself.
    """
    if pace is not None and not pace.keeps(assignment):
        return False
    if any(scheme.is_quantized and scheme.activation is None for scheme in offered.schemes):
        return True
    rounding = {scheme for scheme in assignment.values() if scheme.activation}
    kernels = (
        verdict(task.engine, s, task.hardware, task.spec.linears, checkpoint_format=carried)
        for s in rounding
    )
    # A weight-only kernel leaves inputs in 16 bits, whatever the checkpoint says of them.
    return bool(rounding) and all(kernel.support == "native" for kernel in kernels)


def _steps(task: Task, offered: MixtureOptions) -> dict[Scheme, Step]:
    """Return a decode step under each option, at its own bytes; empty where it is not known."""
    found: dict[Scheme, Step] = {}
    for scheme in dict.fromkeys((*offered.schemes, BF16)):
        step = decode_step(
            task.spec, scheme, _kernel(task, offered, scheme), task.hardware, task.engine,
            linear_bytes=_stored_bytes(task.spec, scheme), context=task.context, batch=task.batch,
        )  # fmt: skip
        if step is None:
            return {}
        found[scheme] = step
    return found


def _kernel(task: Task, offered: MixtureOptions, scheme: Scheme) -> Verdict:
    """Return the verdict on an option in the mixtures' own format, where it fits."""
    unfit = offered.unfit.get(scheme, frozenset())
    linears = [linear for linear in task.spec.linears if linear.name not in unfit]
    carried = offered.format if scheme.is_quantized else None
    return verdict(task.engine, scheme, task.hardware, linears, checkpoint_format=carried)


def _stored_bytes(spec: ModelSpec, scheme: Scheme) -> int:
    """Return about what all linears take."""
    return int(spec.quantizable_parameters * scheme.bits / 8)


def _quick(task: Task, offered: MixtureOptions) -> MixtureOptions | None:
    """Return the options without weight-only ones; None where those are about as fast."""
    merits = {s: _merit(task, offered, s) for s in offered.schemes if s.is_quantized}
    plain = [merit for scheme, merit in merits.items() if scheme.activation is None]
    kept = [scheme for scheme in merits if scheme.activation is not None]
    fastest = max((merits[scheme] for scheme in kept), default=-math.inf)
    if not plain or fastest < max(plain) + math.log2(_GAIN):
        return None
    quick = replace(offered, schemes=(*kept, BF16))
    limit = task.budgets.max_size_bytes
    return None if limit is not None and _least_bytes(task.spec, quick) > limit else quick


def _merit(task: Task, offered: MixtureOptions, scheme: Scheme) -> float:
    """Return doublings of speed: of decoding, and of reading prompts by what that counts."""
    speed = predict_speed(
        task.spec, scheme, _kernel(task, offered, scheme), task.hardware, task.engine,
        linear_bytes=_stored_bytes(task.spec, scheme), context=task.context, batch=task.batch,
    )  # fmt: skip
    if speed.decode is None or speed.prefill is None:
        return 0.0
    return math.log2(speed.decode.expected) + PREFILL_WEIGHT * math.log2(speed.prefill.expected)


def _least_bytes(spec: ModelSpec, offered: MixtureOptions) -> float:
    """Return the size of the smallest uniform checkpoint."""
    sizes = [float("inf")]
    for scheme in offered.schemes:
        if scheme.is_quantized:
            assignment = dict.fromkeys((linear.name for linear in spec.linears), scheme)
            try:
                sizes.append(checkpoint_size(spec, assignment, offered.format).total_bytes)
            except AdvisorError:  # no way to store the scheme for these shapes
                continue
    return min(sizes)


def solve_in_time(
    solve: Callable[[Groups], Allocation],
    groups: Groups,
    seconds: Mapping[str, Mapping[str, float]],
    limit: float,
    objective: str,
) -> Allocation:
    """Return the best assignment that is fast enough, of those on the hull of objective and time.

    Time gets a price, which is raised until the assignment of least objective and price is fast
    enough: each time the price at which the best fast one and the best slow one known would be
    equally good (Kelley's cutting planes for the Lagrangian dual of one constraint).

    Args:
        solve: Exact for its own limit; of groups whose objective has the price in it.
        groups: All groups.
        seconds: By group and option.
        limit: Of the sum of seconds.
        objective: The option's field that is minimised: ``score`` or ``cost``.

    Returns:
        The fastest one where none within the solver's own limit is fast enough.

    Reference: Fisher, "The Lagrangian relaxation method for solving integer programming problems",
    Management Science 27 (1981).
    """

    def at(price: float, share: float = 1.0) -> Allocation:
        def priced(key: str, option: Option) -> Option:
            value = share * getattr(option, objective) + price * seconds[key][option.name]
            return replace(option, **{objective: value})

        priced_groups = {key: [priced(key, o) for o in options] for key, options in groups.items()}
        return _as_given(groups, solve(priced_groups).choice)

    def time(found: Allocation) -> float:
        return sum(seconds[key][name] for key, name in found.choice.items())

    slow = solve(groups)
    if time(slow) <= limit:
        return slow
    fast = at(1.0, share=0.0)
    if time(fast) > limit:
        return fast
    for _ in range(_MOST_SOLVED):
        saved = time(slow) - time(fast)
        price = (getattr(fast, objective) - getattr(slow, objective)) / saved
        if price <= 0:
            break
        found = at(price)
        if found.choice in (fast.choice, slow.choice):
            break
        if time(found) <= limit:
            fast = found
        else:
            slow = found
    return fast


def _as_given(groups: Groups, choice: Mapping[str, str]) -> Allocation:
    """Return an allocation with the costs and scores that its options have."""
    chosen: list[Option] = [
        next(option for option in options if option.name == choice[key])
        for key, options in groups.items()
    ]
    return Allocation(choice, sum(o.cost for o in chosen), sum(o.score for o in chosen))
