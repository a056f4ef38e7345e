"""The report's plots as PNG files, for slides and chats that show no HTML."""

from __future__ import annotations

import importlib
import re
from typing import Any

from advisor.errors import InputError

_WIDTH = 1600
_COLOURS = {
    "--ink": "#15202b", "--soft": "#5b6b7a", "--line": "#d8e0e7", "--strong": "#0b63c5",
    "--back": "#ffffff",
}  # fmt: skip
_FONTS = (
    "Inter", "Noto Sans", "Segoe UI", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans",
)  # fmt: skip
_TEXT_ALONE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 40 20"><text x="2" y="15">x</text></svg>'
)


def render_png(svg: str, style: str) -> bytes:
    """Return a plot as a PNG on white, 1600 pixels wide.

    Args:
        svg: As the charts draw it.
        style: The page's style sheet; its rules for plots apply, in the light colours.

    Raises:
        InputError: The optional renderer is not installed, or the system has no font.
    """
    renderer = _renderer()
    font = _font(renderer)
    rules = "".join(
        f"{selector.strip()}{{{body}}}"
        for selectors, body in re.findall(r"\n?(svg[^{}@]*)\{([^{}]*)\}", style)
        for selector in selectors.split(",")
    )
    for name, colour in _COLOURS.items():
        rules = rules.replace(f"var({name})", colour)
    drawn: bytes = renderer.svg_to_bytes(
        svg_string=svg, width=_WIDTH, background="#ffffff", style_sheet=rules,
        font_family=font, sans_serif_family=font,
    )  # fmt: skip
    return drawn


def _renderer() -> Any:
    """Return the renderer, an optional package."""
    try:
        return importlib.import_module("resvg_py")
    except ImportError as error:
        raise InputError(
            "--png needs the package resvg-py, which is not installed. "
            "Install it: pip install 'quantization-advisor[png]'"
        ) from error


def _font(renderer: Any) -> str:
    """Return a font that the system has; without one the renderer leaves out all text."""
    blank = renderer.svg_to_bytes(svg_string=_TEXT_ALONE.replace(">x<", "><"))
    for name in _FONTS:
        if renderer.svg_to_bytes(svg_string=_TEXT_ALONE, font_family=name) != blank:
            return name
    raise InputError(
        f"--png needs one of the fonts {', '.join(_FONTS)}, but the system has none of them. "
        "Install one, such as Debian's fonts-dejavu-core."
    )
