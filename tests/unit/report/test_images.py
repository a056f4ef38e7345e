"""Plots as PNG files: what they show, and what is said where they cannot be drawn."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from advisor.errors import InputError
from advisor.report import images
from advisor.report.style import STYLE
from advisor.workflows import report

GOLDEN = Path(__file__).parents[2] / "golden" / "plan.yaml"
SVG = (
    '<svg viewBox="0 0 640 340" xmlns="http://www.w3.org/2000/svg">'
    '<rect class="chosen" x="0" y="0" width="640" height="340"/></svg>'
)


class NoFonts:
    @staticmethod
    def svg_to_bytes(**_):
        return b"blank"


@pytest.fixture
def renderer():
    found = pytest.importorskip("resvg_py")
    try:
        images._font(found)
    except InputError:
        pytest.skip("no font on this system")
    return found


def test_style_reaches_the_image(renderer):
    blue = images.render_png(SVG, STYLE)
    assert blue[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", blue[16:24]) == (1600, 850)
    assert blue != images.render_png(SVG.replace("chosen", "point"), STYLE)


def test_every_plot_of_a_plan_becomes_a_file(renderer, tmp_path):
    result = report(GOLDEN, tmp_path / "r.html", png=tmp_path / "plots")
    assert {path.name for path in result.images} <= {
        "loss-against-size.png", "bits-per-module.png", "predicted-and-measured.png", "trials.png",
    }  # fmt: skip
    assert "loss-against-size.png" in {path.name for path in result.images}
    assert all(path.stat().st_size > 2000 for path in result.images)
    assert result.to_dict()["images"] == [str(path) for path in result.images]
    assert report(GOLDEN, tmp_path / "s.html").images == ()


def test_missing_renderer_and_missing_fonts_are_one_clear_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(InputError, match=r"pip install 'quantization-advisor\[png\]'"):
        report(GOLDEN, tmp_path / "r.html", png=tmp_path / "plots")
    assert not (tmp_path / "r.html").exists(), "nothing is written then"
    monkeypatch.setitem(sys.modules, "resvg_py", NoFonts)
    with pytest.raises(InputError, match="the system has none of them"):
        images.render_png(SVG, STYLE)
