"""The tables of the grid at equal bytes, on rows whose ratios are known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def bench():
    """The scripts of this folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import equal_bytes_peers
        import equal_bytes_table
    finally:
        sys.path.pop(0)
    return equal_bytes_peers, equal_bytes_table


def peer_row(seed, kl, **more):
    row = {"kind": "peer", "library": "lib", "scheme": "a", "seed": seed, "bytes": 1000}
    return row | measured(kl) | more


def our_row(seed, kl, **more):
    row = {"kind": "ours", "engine": "vllm", "limit": 1000, "seed": seed, "bytes": 990}
    return row | measured(kl) | more


def measured(kl):
    flat = [1.0] * len(kl)
    return {"kl": kl, "nll": flat, "reference_nll": flat, "agreement": [0.9] * len(kl)}


def test_a_ratio_is_of_means_over_seeds_and_each_seed_meets_its_own(bench):
    peers, table = bench
    peer = peers.Peer("lib", "a", 4)
    rows = [peer_row(0, [0.2, 0.4]), peer_row(1, [0.4, 0.6]), our_row(1, [0.1, 0.1]),
            our_row(0, [0.3, 0.3])]  # fmt: skip
    (line,) = table.lines_of(rows, [peer])
    assert line.ratio == pytest.approx(0.2 / 0.4)
    assert line.seeds == pytest.approx((1.0, 0.2))
    assert line.low <= line.ratio <= line.high


def test_a_checkpoint_without_calibration_meets_every_seed(bench):
    peers, table = bench
    peer = peers.Peer("lib", "a", 4, looks_at_text=False)
    rows = [peer_row(None, [0.4, 0.4]), our_row(0, [0.1, 0.1]), our_row(1, [0.3, 0.3])]
    (line,) = table.lines_of(rows, [peer])
    assert line.seeds == pytest.approx((0.25, 0.75))


def test_an_answer_for_another_size_is_no_answer(bench):
    peers, table = bench
    peer = peers.Peer("lib", "a", 4)
    larger, smaller = our_row(0, [0.1], limit=1001), our_row(0, [0.1], limit=990)
    assert table.lines_of([peer_row(0, [0.2]), larger], [peer]) == []
    assert table.lines_of([peer_row(0, [0.2]), smaller], [peer]) == []


def test_an_answer_larger_than_its_limit_ends_it(bench):
    peers, table = bench
    peer = peers.Peer("lib", "a", 4)
    with pytest.raises(SystemExit, match="larger than its limit"):
        table.lines_of([peer_row(0, [0.2]), our_row(0, [0.1], bytes=1001)], [peer])


def test_a_small_kl_is_printed_in_three_figures_and_not_as_nothing(bench, capsys):
    peers, table = bench
    rows = [peer_row(0, [1.12e-5, 1.12e-5]), our_row(0, [4.617e-6, 4.617e-6])]
    table.print_tables(rows, [peers.Peer("lib", "a", 8)])
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("| 8 | lib")
    ]
    assert "| 1.12e-05 [1.12e-05, 1.12e-05] |" in line
    assert "| 4.62e-06 [4.62e-06, 4.62e-06] |" in line
    assert "**0.41**" in line
