"""``advisor profile`` as a person sees it."""

from __future__ import annotations

from rich.console import Console

from advisor import workflows
from advisor.cli.profile import _render
from advisor.hardware import measure as bench
from advisor.hardware.catalogue import find_profile


def test_what_was_measured_is_shown_beside_the_table(monkeypatch, capsys):
    whole, table = bench.measure, find_profile("cpu-avx2-ddr5-2ch")
    monkeypatch.setattr(
        bench, "measure", lambda device, _profile: whole(device, table, repeats=2, scale=0.02)
    )
    document = workflows.profile(gpu="cpu", measure=True).to_dict()
    _render(Console(width=120, force_terminal=False), document)
    lines = capsys.readouterr().out.partition("Measured on")[2].splitlines()
    shown = {line.split()[0]: line for line in lines if line.strip()}
    bandwidth = document["measured"]["measured"][0]
    assert f"{bandwidth['share_of_table']:.0%}" in shown["bandwidth"]
    assert "GB/s" in shown["bandwidth"]
    assert "89.6" in shown["bandwidth"]
    assert "a CPU has no FP8 product" in shown["FP8"]
