"""The map of a mixture: what every module takes, a row per kind, a column per block.

Darker is more bits. Integers and 16 bits are blue, floating point types green, and what rounds its
inputs at run time too violet, so that types of equal bits are told apart. Deep models are wrapped
into bands of rows, and the experts of a block share a cell.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from advisor.errors import InputError
from advisor.predict.gguf_types import row_bytes
from advisor.predict.storage import module_parts
from advisor.report.charts import WIDTH, draw_svg
from advisor.schemes import parse_scheme

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LEFT, _ROW, _LEGEND_ROW = 146, 24, 20
_TICKS = 20
"""Height of the blocks' numbers below a band."""
_NARROWEST, _WIDEST = 10, 28
_INTEGER, _FLOAT, _ROUNDING = 212, 160, 285
"""Hues."""
_FLOATS = ("fp8", "nvfp4", "mxfp4", "mxfp8", "nf4", "fp4")
_SIDE = 4096
"""Of a matrix that every group and block divides: what a scheme takes there is its bits."""


def bits_map(schemes: Mapping[str, str], format_name: str) -> str:
    """Draw bits per weight of each module, scales and zero points counted.

    Args:
        schemes: Module path to scheme's name.
        format_name: How the checkpoint stores them.

    Returns:
        An SVG element; empty where no module belongs to a numbered block.
    """
    cells: dict[tuple[str, int], Counter[str]] = {}
    for name, scheme in schemes.items():
        if match := re.search(r"\.(\d+)\.(.+)$", name):
            kind = re.sub(r"\bexperts\.\d+\.", "experts.", match[2])
            cells.setdefault((kind, int(match[1])), Counter())[scheme] += 1
    if not cells:
        return ""
    bits = {s: stored_bits(s, format_name) for s in {s for cell in cells.values() for s in cell}}
    shades = _shades(bits)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    bands = math.ceil(len(blocks) / ((WIDTH - _LEFT) // _NARROWEST))
    across = math.ceil(len(blocks) / bands)
    width = max(_NARROWEST, min(_WIDEST, (WIDTH - _LEFT) // across))
    parts, top = [], 10
    for first in range(0, len(blocks), across):
        band = blocks[first : first + across]
        parts.append(_band(cells, kinds, band, bits, shades, (top, width)))
        top += len(kinds) * _ROW + _TICKS
    ordered = sorted(bits, key=lambda scheme: (bits[scheme], scheme))
    parts.append(_legend([(s, bits[s], shades[s]) for s in ordered], top + 4))
    height = top + 10 + _LEGEND_ROW * len(ordered)
    return draw_svg("".join(parts), "Bits per module", height=height)


def _band(
    cells: Mapping[tuple[str, int], Counter[str]],
    kinds: Sequence[str],
    blocks: Sequence[int],
    bits: Mapping[str, float],
    shades: Mapping[str, tuple[int, int]],
    place: tuple[int, int],
) -> str:
    """Return a row per kind for some blocks, and their numbers.

    Args:
        cells: How many modules of a kind and block take each scheme.
        kinds: The rows.
        blocks: The columns.
        bits: Of each scheme.
        shades: The same: hue and lightness.
        place: Top of the band and width of a column, pixels.
    """
    top, width = place
    parts = []
    for row, kind in enumerate(kinds):
        at = top + row * _ROW
        label = escape(_label(kind, kinds))
        parts.append(f'<text class="small" x="138" y="{at + 15}" text-anchor="end">{label}</text>')
        for column, block in enumerate(blocks):
            if (found := cells.get((kind, block))) is None:
                continue
            scheme, count = found.most_common(1)[0]
            title = f"{kind}, block {block}: {scheme}, {bits[scheme]:.2f} bits"
            if found.total() > 1:
                title += f", {count} of {found.total()} experts"
            left = _LEFT + column * width
            parts.append(_cell(left, at, width, bits[scheme], shades[scheme], title))
    bottom = top + len(kinds) * _ROW
    for column, block in enumerate(blocks):
        if column % max(1, math.ceil(len(blocks) / 12)) == 0:
            middle = _LEFT + column * width + width / 2
            parts.append(
                f'<text class="small" x="{middle}" y="{bottom + 12}" '
                f'text-anchor="middle">{block}</text>'
            )
    return "".join(parts)


def _label(kind: str, kinds: Sequence[str]) -> str:
    """Return a row's name: the module's own, with its parent's where others are called alike.

    Short, for phones draw it large: ``shared down`` of ``mlp.shared_expert.down_proj``.
    """
    *parents, name = kind.split(".")
    if not parents or sum(other.split(".")[-1] == name for other in kinds) == 1:
        return name
    return f"{parents[-1].split('_')[0]} {name.removesuffix('_proj')}"


def stored_bits(scheme: str, format_name: str) -> float:
    """Return the bits per weight that a scheme takes in a format, scales and zero points counted.

    Args:
        scheme: Its name, as a plan holds it.
        format_name: The plan's format.
    """
    parsed = parse_scheme(scheme)
    try:
        if parsed.method == "gguf":
            return 8 * row_bytes(parsed.weight, _SIDE) / _SIDE
        parts = module_parts(parsed, format_name, _SIDE, _SIDE)
    except (InputError, KeyError):  # a GGUF file's type, or what the format holds otherwise
        return parsed.bits
    return 8 * sum(part.size_bytes for part in parts) / _SIDE**2


def _cell(left: int, top: int, width: int, bits: float, shade: tuple[int, int], title: str) -> str:
    drawn = (
        f'<rect x="{left}" y="{top}" width="{width - 2}" height="20" fill="{_colour(shade)}">'
        f"<title>{escape(title)}</title></rect>"
    )
    if width >= 18:
        ink = "#fff" if shade[1] < 60 else "#123"
        drawn += (
            f'<text class="cell" x="{left + width / 2 - 1}" y="{top + 14}" style="fill:{ink}" '
            f'text-anchor="middle">{bits:.2g}</text>'
        )
    return drawn


def _legend(schemes: Sequence[tuple[str, float, tuple[int, int]]], top: float) -> str:
    """Return a swatch with its name and bits for every scheme of the map."""
    parts = []
    for place, (scheme, bits, shade) in enumerate(schemes):
        at = top + place * _LEGEND_ROW
        parts.append(
            f'<rect x="{_LEFT}" y="{at}" width="14" height="14" fill="{_colour(shade)}"/>'
            f'<text class="small" x="{_LEFT + 19}" y="{at + 11}">{escape(scheme)}, '
            f"{bits:.2f} bits</text>"
        )
    return "".join(parts)


def _shades(bits: Mapping[str, float]) -> dict[str, tuple[int, int]]:
    """Return each scheme's hue, and its lightness, 85 to 35: the most bits are the darkest."""
    low, high = min(bits.values()), max(bits.values())
    span = max(high - low, 1e-9)
    return {
        scheme: (_hue(scheme), round(85 - 50 * (value - low) / span))
        for scheme, value in bits.items()
    }


def _hue(scheme: str) -> int:
    parsed = parse_scheme(scheme)
    if parsed.activation is not None:
        return _ROUNDING
    return _FLOAT if parsed.weight in _FLOATS else _INTEGER


def _colour(shade: tuple[int, int]) -> str:
    return f"hsl({shade[0]} 60% {shade[1]}%)"
