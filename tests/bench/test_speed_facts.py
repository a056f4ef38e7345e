"""Speed against published measurements."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def facts():
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import speed_facts
    finally:
        sys.path.pop(0)
    return speed_facts


@pytest.mark.parametrize(
    ("engine", "limit"), [("llama.cpp", 0.20), ("vllm", 0.25), ("transformers", 0.25)]
)
def test_mean_error_on_project_benchmarks(facts, engine, limit, capsys):
    points = [point for point in facts.load_points((engine,)) if point.trusted]
    error = facts.mape(points)
    with capsys.disabled():
        print(f"\n{engine}: {len(points)} points, MAPE {error:.0%}, "
              f"median factor {facts.median_factor(points):.2f}")  # fmt: skip
    assert len(points) > 30
    assert error < limit


def test_community_uploads_of_llama_cpp(facts):
    points = [point for point in facts.load_points(("llama.cpp",)) if not point.trusted]
    assert facts.median_factor(points) < 1.4


def test_sign_of_the_speed_up(facts):
    """Where a published table holds 16-bit and quantized speeds, who is faster must agree."""
    points = [p for p in facts.load_points() if p.trusted]
    sixteen = {
        (p.engine, p.model, p.gpu, p.batch): p for p in points if p.method in ("BF16", "fp16")
    }
    right = total = 0
    for point in points:
        base = sixteen.get((point.engine, point.model, point.gpu, point.batch))
        if base is None or base is point or abs(point.measured / base.measured - 1) < 0.1:
            continue
        total += 1
        right += (point.measured > base.measured) == (point.predicted > base.predicted)
    assert total > 20
    assert right / total > 0.8
