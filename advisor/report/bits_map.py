"""The map of a mixture: what every module takes, a row per kind, a column per block."""

from __future__ import annotations

import re
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
    cells: dict[tuple[str, int], str] = {}
    for name, scheme in schemes.items():
        if match := re.search(r"\.(\d+)\.(.+)$", name):
            cells[match[2], int(match[1])] = scheme
    if not cells:
        return ""
    bits = {scheme: stored_bits(scheme, format_name) for scheme in set(cells.values())}
    shades = _shades(bits)
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = sorted({block for _, block in cells})
    width = max(10, min(28, (WIDTH - 150) // len(blocks)))
    parts = []
    for row, kind in enumerate(kinds):
        top = 10 + row * _ROW
        label = escape(kind.split(".")[-1])
        parts.append(f'<text class="small" x="138" y="{top + 15}" text-anchor="end">{label}</text>')
        for column, block in enumerate(blocks):
            if (kind, block) in cells:
                scheme = cells[kind, block]
                title = f"{kind}, block {block}: {scheme}, {bits[scheme]:.2f} bits"
                at = _LEFT + column * width
                parts.append(_cell(at, top, width, bits[scheme], shades[scheme], title))
    bottom = 10 + len(kinds) * _ROW
    for column, block in enumerate(blocks):
        if column % max(1, len(blocks) // 10) == 0:
            middle = _LEFT + column * width + width / 2
            parts.append(
                f'<text class="small" x="{middle}" y="{bottom + 12}" '
                f'text-anchor="middle">{block}</text>'
            )
    ordered = sorted(bits, key=lambda scheme: (bits[scheme], scheme))
    parts.append(_legend([(s, bits[s], shades[s]) for s in ordered], bottom + 24))
    height = bottom + 30 + _LEGEND_ROW * len(ordered)
    return draw_svg("".join(parts), "Bits per module", height=height)


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


def _cell(left: int, top: int, width: int, bits: float, shade: int, title: str) -> str:
    drawn = (
        f'<rect x="{left}" y="{top}" width="{width - 2}" height="20" fill="{_colour(shade)}">'
        f"<title>{escape(title)}</title></rect>"
    )
    if width >= 18:
        ink = "#fff" if shade < 60 else "#123"
        drawn += (
            f'<text class="cell" x="{left + width / 2 - 1}" y="{top + 14}" style="fill:{ink}" '
            f'text-anchor="middle">{bits:.2g}</text>'
        )
    return drawn


def _legend(schemes: Sequence[tuple[str, float, int]], top: float) -> str:
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


def _shades(bits: Mapping[str, float]) -> dict[str, int]:
    """Return each scheme's lightness, 85 to 35: the most bits of this map are the darkest."""
    low, high = min(bits.values()), max(bits.values())
    span = max(high - low, 1e-9)
    return {scheme: round(85 - 50 * (value - low) / span) for scheme, value in bits.items()}


def _colour(shade: int) -> str:
    return f"hsl(212 60% {shade}%)"
