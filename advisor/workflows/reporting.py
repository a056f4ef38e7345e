"""``report``: the page of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advisor.errors import InputError
from advisor.plan.files import load_plan, write_atomically
from advisor.report.images import render_png
from advisor.report.page import render_plots, render_report
from advisor.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from advisor.plan.schema import ModelIdentity


@dataclass(frozen=True, slots=True)
class ReportResult:
    """Where the page is, and the plots as images."""

    output: Path
    images: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the document of ``advisor report --json``."""
        return {
            "schema_version": 1,
            "output": str(self.output),
            "bytes": self.output.stat().st_size,
            "images": [str(path) for path in self.images],
        }


def report(
    plan: str | Path, output: str | Path = "report.html", *, png: str | Path | None = None
) -> ReportResult:
    """Write one self-contained HTML page from a plan.

    Args:
        plan: The plan's file.
        output: The page.
        png: Folder for the plots as PNG files; made if it does not exist.

    Raises:
        InputError: The plan is invalid, the output cannot be written, or images cannot be drawn.
    """
    target = Path(output)
    if target.is_dir():
        raise InputError(
            f"--output must be a file, but {target} is a folder. Use {target}/report.html."
        )
    content = load_plan(Path(plan))
    modules = _modules(content.model)
    drawn = {} if png is None else _draw(render_plots(content, modules))
    write_atomically(target, render_report(content, modules))
    return ReportResult(target, _write(drawn, Path(png)) if png is not None else ())


def _draw(plots: Mapping[str, str]) -> dict[str, bytes]:
    """Return every plot as an image, before anything is written."""
    return {title: render_png(svg, STYLE) for title, svg in plots.items()}


def _write(drawn: Mapping[str, bytes], folder: Path) -> tuple[Path, ...]:
    """Write images under their titles: ``loss-against-size.png``."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for title, image in drawn.items():
            path = folder / f"{title.lower().replace(' ', '-')}.png"
            path.write_bytes(image)
            paths.append(path)
    except OSError as error:
        raise InputError(f"--png cannot write to {folder}: {error.strerror}.") from error
    return tuple(paths)


def _modules(identity: ModelIdentity) -> tuple[str, ...]:
    """Return the model's linears; none where the model is not at hand any more."""
    from huggingface_hub import try_to_load_from_cache

    from advisor.plan.hashing import is_hub_id
    from advisor.predict.models import load_modelspec

    place: str | Path = identity.id
    if is_hub_id(identity.id):  # a page is written without asking the network
        config = try_to_load_from_cache(identity.id, "config.json", revision=identity.revision)
        if not isinstance(config, str):
            return ()
        place = Path(config).parent
    try:
        return tuple(linear.name for linear in load_modelspec(place).linears)
    except InputError:
        return ()
