"""Charts of the search: every point where its numbers put it."""

from __future__ import annotations

import re

import pytest

from advisor.report.scatter import Scored, best_by_trial, scores_against_measured
from advisor.search.outcomes import TrialRecord, best_so_far


def _circles(svg):
    return [
        tuple(float(v) for v in match) for match in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]


def test_points_on_the_diagonal_are_on_the_line():
    svg = scores_against_measured([Scored("a", 0.001, 0.001), Scored("b<", 0.1, 0.1, True)])
    (x0, y0), (x1, y1) = _circles(svg)
    line = re.search(r'<line class="axis" x1="(\d+)" y1="(\d+)" x2="(\d+)" y2="(\d+)" stroke', svg)
    left, bottom, right, top = (float(v) for v in line.groups())
    for x, y in ((x0, y0), (x1, y1)):
        assert (x - left) / (right - left) == pytest.approx((bottom - y) / (bottom - top), abs=0.01)
    assert "b&lt;" in svg
    assert scores_against_measured([Scored("a", 1, 1)]) == ""


def test_staircase_falls_where_a_trial_was_better():
    svg = best_by_trial([(1, 0.5), (4, 0.2)], 10, "KL")
    (x0, y0), (x1, y1) = _circles(svg)
    assert x1 > x0
    assert y1 > y0, "lower values lie lower"
    assert re.search(rf'd="M{x0:.1f} {y0:.1f}H{x1:.1f}V{y1:.1f}H', svg)
    assert best_by_trial([], 10, "KL") == ""


def test_best_so_far_keeps_what_is_within_the_budgets():
    rows = [(0.5, True), (0.1, False), (None, False), (0.6, True), (0.3, True)]
    records = [TrialRecord(i, {}, value, ok, None, {}) for i, (value, ok) in enumerate(rows)]
    assert best_so_far(records) == [(1, 0.5), (5, 0.3)]
