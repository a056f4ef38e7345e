from __future__ import annotations

import io

import pytest

from advisor.cli import why_not


def candidate(name, *violations, support="native", reason="", source=None):
    return {
        "name": name,
        "kernel": {"support": support, "reason": reason, "source": source},
        "violations": [
            {"budget": budget, "limit": limit, "value": value}
            for budget, limit, value in violations
        ],
        "why_not": None,
    }


def draw(rows, width=80, **options):
    from rich.console import Console

    stream = io.StringIO()
    why_not.render(Console(file=stream, width=width), rows, **options)
    return stream.getvalue().splitlines()


SIZE = ("max_size", 6e9)


def test_grouped_by_reason_the_nearest_first():
    rows = [
        candidate("far", (*SIZE, 16.1e9)),
        candidate("both", (*SIZE, 6.03e9), ("max_loss", 0.03, 0.061)),
        candidate("near", (*SIZE, 6.1e9)),
    ]
    assert draw(rows) == [
        "  Larger than 6 GB (2)",
        "    near  6.10 GB   far   16.1 GB",
        "  Larger than 6 GB and loss above 3% (1)",
        "    both  6.03 GB, 6.1%",
    ]


def test_a_group_shows_six_and_counts_the_rest():
    rows = [candidate(f"scheme-{n}", (*SIZE, (7 + n) * 1e9)) for n in range(9)]
    lines = draw(rows, width=30)
    assert len(lines) == 1 + 6 + 1
    assert lines[-1] == "    and 3 more"
    assert len(draw(rows, width=30, everything=True)) == 1 + 9


@pytest.mark.parametrize("width", [60, 80, 110])
def test_no_line_is_wider_than_the_terminal(width):
    rows = [
        candidate(f"smoothquant-int8-gch-sym-aint{n}", (*SIZE, (7 + n) * 1e9)) for n in range(9)
    ]
    assert max(map(len, draw(rows, width=width))) <= width


def test_kernels_come_last_with_the_rule_that_decided_and_its_source():
    reason = "no kernel of vLLM runs x on L4 - cutlass: needs exactly sm_90; marlin: no fp8"
    rows = [
        candidate("x", support="none", reason=reason, source="repo file@1"),
        candidate("slow", ("min_speed", 40, 12.3)),
    ]
    assert draw(rows) == [
        "  Slower than 40 tok/s (1)",
        "    slow  12.3",
        "  No kernel: cutlass: needs exactly sm_90 (1)",
        "    source: repo file@1",
        "    x",
    ]


def test_a_figure_that_is_not_known_is_said_and_comes_last():
    rows = [candidate("dark", ("min_speed", 40, None)), candidate("slow", ("min_speed", 40, 1.0))]
    assert draw(rows)[1] == "    slow        1   dark  unknown"


def test_decisive_rule_without_the_engines_name():
    assert why_not.decisive("llama.cpp: llama.cpp reads GGUF only") == "llama.cpp reads GGUF only"
    assert why_not.decisive("vLLM has no kernel for nf4 weights on rocm").startswith("vLLM has no")
