"""Linear relaxation of the multiple-choice knapsack: lower convex hulls, merged by slope."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Sequence

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


def hull(cost: Floats, score: Floats) -> list[int]:
    """Return the options on the lower convex hull, by rising cost and falling score."""
    order = np.lexsort((score, cost))
    corners: list[int] = []
    for index in order.tolist():
        if corners and score[index] >= score[corners[-1]]:
            continue
        while len(corners) >= 2:
            first, second = corners[-2], corners[-1]
            left = (score[second] - score[first]) * (cost[index] - cost[first])
            right = (score[index] - score[first]) * (cost[second] - cost[first])
            if left < right:
                break
            corners.pop()
        corners.append(index)
    return corners


def steps(
    cost: Sequence[Floats], score: Sequence[Floats], hulls: Sequence[Sequence[int]]
) -> list[tuple[float, int, int]]:
    """Return all hulls' edges as (slope, group, option reached), steepest gain first."""
    edges = []
    for group, corners in enumerate(hulls):
        for before, after in itertools.pairwise(corners):
            slope = (score[group][after] - score[group][before]) / (
                cost[group][after] - cost[group][before]
            )
            edges.append((float(slope), group, after))
    # A hull's slopes rise along it, so the sort keeps each group's edges in order; equal slopes
    # within a hull do not exist, because collinear points are not corners.
    return sorted(edges)


def greedy(
    cost: Sequence[Floats], score: Sequence[Floats], hulls: Sequence[Sequence[int]], limit: float
) -> Indices:
    """Return a good assignment within the limit: take the steepest gains that still fit."""
    choice = np.array([corners[0] for corners in hulls], dtype=np.int64)
    spent = float(sum(cost[group][option] for group, option in enumerate(choice)))
    for _, group, option in steps(cost, score, hulls):
        more = float(cost[group][option] - cost[group][choice[group]])
        if spent + more <= limit:
            choice[group] = option
            spent += more
    return choice


def open_bounds(
    cost: Sequence[Floats],
    score: Sequence[Floats],
    order: Sequence[int],
    hulls: Sequence[Sequence[int]],
) -> list[tuple[Floats, Floats]]:
    """Return, for each position, the relaxed frontier (cost, score) of the groups after it."""
    result: list[tuple[Floats, Floats]] = []
    edges: list[tuple[float, float, float]] = []
    start_cost, start_score = 0.0, 0.0
    for position in range(len(order) - 1, -1, -1):
        steps = np.array(sorted(edges)).reshape(-1, 3)
        result.append(
            (
                start_cost + np.concatenate(([0.0], np.cumsum(steps[:, 1]))),
                start_score + np.concatenate(([0.0], np.cumsum(steps[:, 2]))),
            )
        )
        corners = hulls[order[position]]
        own_cost, own_score = cost[position][corners], score[position][corners]
        start_cost, start_score = start_cost + own_cost[0], start_score + own_score[0]
        for dc, ds in zip(np.diff(own_cost), np.diff(own_score), strict=True):
            edges.append((float(ds / dc), float(dc), float(ds)))
    return result[::-1]
