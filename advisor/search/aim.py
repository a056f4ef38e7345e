"""What a search is after, and the space it looks in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from advisor.calibration.mixing import mixes
from advisor.models.rotation import NONE, ROTATIONS, rotation_problem
from advisor.plan.hashing import sha256_json
from advisor.search.effort import FULL, Effort
from advisor.search.goal import Goal, goal_of
from advisor.search.limits import SizeLimit, size_limits
from advisor.search.space import Space, build_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from advisor.engines.options import MixtureOptions
    from advisor.modelspec.outer import OuterModule
    from advisor.search.compose import Composer
    from advisor.search.pace import Pace
    from advisor.search.planning import Task

_logger = logging.getLogger(__name__)


def aim(
    task: Task,
    offered: MixtureOptions,
    composer: Composer,
    outer: Sequence[OuterModule],
    *,
    prefer: str,
    pace: Pace | None,
    prefixes: Sequence[int],
    methods: Sequence[str] = FULL.methods,
) -> tuple[tuple[SizeLimit, ...], Goal, Space]:
    """Return the limits on size, what is wanted within them, and where to look for it.

    Args:
        task: What is asked.
        offered: What the engine mixes.
        composer: Of candidates.
        outer: Embedding and head, where they are to be quantized.
        prefer: What breaks ties.
        pace: A limit on time.
        prefixes: Numbers of calibration sequences that statistics are kept of.
        methods: Families of integers that may be tried.
    """
    smallest, largest = composer.smallest_and_largest()
    limits = size_limits(
        task.spec, smallest, largest, composer.options, task.hardware, task.engine,
        task.budgets, context=task.context, batch=task.batch,
    )  # fmt: skip
    goal = goal_of(task.budgets, prefer, limits[0].max_bytes if limits else None, pace)
    high = largest.bits_per_weight
    if outer:  # what embedding and head may take more is counted as the linears'
        more = largest.total_bytes - smallest.total_bytes + smallest.quantizable_bytes
        high = 8 * more / task.spec.quantizable_parameters
    if goal.max_bytes is not None:
        beside = smallest.total_bytes - smallest.quantizable_bytes
        high = min(high, 8 * (goal.max_bytes - beside) / task.spec.quantizable_parameters)
    low = smallest.bits_per_weight
    space = build_space(
        composer.options, prefixes,
        low_bits=low, high_bits=max(low, high), mixes=mixes(task.calibration),
        rotations=_rotations(task, offered, outer), methods=methods,
    )  # fmt: skip
    return tuple(limits), goal, space


def _rotations(
    task: Task, offered: MixtureOptions, outer: Sequence[OuterModule]
) -> tuple[str, ...]:
    """Return the rotations that the model and the format allow; a tied head allows none."""
    problem = rotation_problem(task.loaded.model)
    if problem is None and outer:
        problem = "embedding or head are to be quantized"
    if problem is not None or offered.format == "gguf":
        _logger.info("the residual stream is not rotated: %s", problem or "GGUF")
        return (NONE,)
    return ROTATIONS


def name_of_study(
    task: Task,
    offered: MixtureOptions,
    space: Space,
    goal: Goal,
    statistics: str,
    *,
    seed: int,
    sampler: str,
    outer: Sequence[OuterModule],
    effort: Effort = FULL,
) -> str:
    """Return a name that differs whenever a trial could come out differently.

    Args:
        task: What is asked.
        offered: What the engine mixes.
        space: Where the study looks.
        goal: What it is after.
        statistics: Key of the statistics that candidates are scored by.
        seed: Of the sampler.
        sampler: Which one.
        outer: Embedding and head, where they are to be quantized.
        effort: What the search spends.
    """
    content: dict[str, Any] = {
        "statistics": statistics,
        "space": {key: repr(value) for key, value in space.to_dict().items()},
        "goal": repr(goal),
        "options": [str(scheme) for scheme in offered.schemes],
        "format": offered.format,
        "settings": task.settings.to_dict(),
        "seed": seed,
    }
    if sampler != "tpe":
        content["sampler"] = sampler
    if effort != FULL:
        content["effort"] = effort.name
    if outer:
        content["outer"] = [module.name for module in outer]
    return f"advisor-{sha256_json(content)[:16]}"
