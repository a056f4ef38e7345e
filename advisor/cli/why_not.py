"""Why a scheme was ruled out, grouped by reason so that forty schemes fit on a screen."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from advisor.cli import output

if TYPE_CHECKING:
    from collections.abc import Sequence

_NEAREST = 6
"""Schemes shown of a group: those that miss the limit by least."""
_RULES = {
    "max_size": "larger than {}",
    "max_memory": "memory above {}",
    "max_loss": "loss above {}",
    "max_kl": "KL above {}",
    "max_accuracy_drop": "accuracy drop above {}",
    "min_speed": "slower than {} tok/s",
}


def render(console: Any, candidates: Sequence[dict[str, Any]], *, everything: bool = False) -> None:
    """Draw the ruled-out candidates, one group a reason.

    Args:
        console: Where to draw.
        candidates: The ruled-out rows of the document.
        everything: Show every scheme of a group, and the source of each kernel's rule in full.
    """
    for heading, source, members in groups(candidates):
        for line in textwrap.wrap(
            f"{heading} ({len(members)})", console.width, initial_indent="  ",
            subsequent_indent="    ", break_long_words=False, break_on_hyphens=False,
        ):  # fmt: skip
            console.print(line, markup=False)
        if source:
            console.print(f"    source: {source}", style="dim", markup=False, soft_wrap=True)
        shown = members if everything else members[:_NEAREST]
        rest = len(members) - len(shown)
        cells = [(row["name"], _values(row)) for row in shown]
        _grid(console, cells, f"and {rest} more" if rest else "")


def groups(
    candidates: Sequence[dict[str, Any]],
) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Group ruled-out candidates by reason: heading, source, members nearest to the limit first."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in candidates:
        found.setdefault(_reason(row), []).append(row)
    ordered = []
    for (heading, source), members in found.items():
        members.sort(key=_excess)
        ordered.append((heading, source, members))
    # What breaks one budget before what breaks several, and both before what nothing runs.
    ordered.sort(key=lambda group: (bool(group[1]), len(group[2][0]["violations"])))
    return ordered


def one_line(row: dict[str, Any]) -> str:
    """Say in one line why a candidate is ruled out, for a cell of a table."""
    heading, _ = _reason(row)
    values = _values(row)
    return f"{heading}: {values}" if values else heading


def amount(budget: str, value: float | None) -> str:
    """Print a budget's value in its own unit."""
    if value is None:
        return "unknown"
    if budget in ("max_size", "max_memory"):
        return output.size(value)
    if budget == "max_loss":
        return output.percent(value)
    if budget == "max_accuracy_drop":
        return f"{100 * value:.2g} points"
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _reason(row: dict[str, Any]) -> tuple[str, str]:
    violations = row["violations"]
    if row["kernel"]["support"] == "none" or not violations:
        if row["kernel"]["support"] == "none":
            text = f"No kernel: {decisive(row['kernel']['reason'])}"
            return text, row["kernel"].get("source") or ""
        return str(row.get("why_not") or row["kernel"]["reason"]), ""
    rules = [
        _RULES[entry["budget"]].format(_limit(entry["budget"], entry["limit"]))
        for entry in violations
    ]
    text = " and ".join(rules)
    return text[0].upper() + text[1:], ""


def decisive(reason: str) -> str:
    """Return the rule that decided: of a list of kernels the one that came nearest, listed first.

    ``no kernel of E runs S on D - a: needs x; b: needs y`` becomes ``a: needs x``.
    """
    _, dash, kernels = reason.partition(" - ")
    first = (kernels if dash else reason).split("; ")[0]
    # "vLLM: the table ..." repeats the engine that the heading of the answer names already.
    engine = re.match(r"(vLLM|SGLang|transformers|llama\.cpp|TensorRT-LLM): ", first)
    return first[engine.end() :] if engine and not dash else first


def _limit(budget: str, value: float) -> str:
    """Print a limit as it was typed: 6 GB, 3%."""
    number, unit = re.fullmatch(r"([\d.]+)(.*)", amount(budget, value)).groups()  # type: ignore[union-attr]
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit


def _excess(row: dict[str, Any]) -> float:
    """By how much the worst budget is missed, as a factor."""
    factors = [1.0]
    for entry in row["violations"]:
        value, limit = entry["value"], entry["limit"]
        if value is None:
            return float("inf")
        high, low = (limit, value) if entry["budget"] == "min_speed" else (value, limit)
        factors.append(high / low if low else float("inf"))
    return max(factors)


def _values(row: dict[str, Any]) -> str:
    if row["kernel"]["support"] == "none":
        return ""
    return ", ".join(amount(entry["budget"], entry["value"]) for entry in row["violations"])


def _grid(console: Any, cells: Sequence[tuple[str, str]], last: str) -> None:
    """Draw names with values in as many aligned columns as the width holds."""
    name_width = max(len(name) for name, _ in cells)
    value_width = max(len(value) for _, value in cells)
    texts = [
        f"{name:<{name_width}}  {value:>{value_width}}" if value_width else f"{name:<{name_width}}"
        for name, value in cells
    ]
    if last:
        texts.append(last)
    width = name_width + (value_width + 2 if value_width else 0)
    columns = max(1, (console.width - 4 + 3) // (width + 3))
    for start in range(0, len(texts), columns):
        line = "   ".join(f"{text:<{width}}" for text in texts[start : start + columns])
        console.print(f"    {line.rstrip()}", style="dim", markup=False, no_wrap=True)
