"""AWQ's scale search for a whole model: ours beside llm-compressor's, cost and error: a table.

    python tests/bench/awq_cost.py MODEL [--scheme awq-int4-g64-asym] [--samples 32] [--length 256]
        [--steps 20] [--duo] [--blocks N]

Both see the same tokens and try as many exponents of the mean magnitude of the inputs (theirs i/N,
ours i/(N-1); ``--duo`` lets theirs also divide by the weights' magnitudes, its default). CPU
seconds in one thread: ours are the statistics (one forward pass, which any other candidate shares)
and the search, for a checkpoint (all rows) and as candidates are scored (some rows, and one
rounding); theirs the ``oneshot`` call with its calibration, and its search alone. The error of
scales is that of the linears they scale, tr(ΔW H ΔWᵀ) with the rounding of the scheme and H of the
same tokens. Theirs is searched on the outputs of the parent module instead. ``--blocks`` cuts the
model to its first blocks.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from cpu_cost import cost, one_thread
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from advisor.calibration.store import StatisticsStore
    from advisor.models.load import LoadedModel
    from advisor.modelspec import LinearSpec
    from advisor.schemes import Scheme


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--scheme", default="awq-int4-g64-asym")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3, help="the median of so many searches")
    parser.add_argument("--duo", action="store_true")
    parser.add_argument("--blocks", type=int)
    given = parser.parse_args()
    one_thread()
    with tempfile.TemporaryDirectory() as name:
        folder = given.model
        if given.blocks is not None:
            folder = cut(given.model, Path(name) / "model", given.blocks)
        _compare(folder, Path(name), given)


def _compare(folder: Path, work: Path, given: argparse.Namespace) -> None:
    from library_cost import library_cost

    from advisor.calibration.collect import collect_statistics, open_store
    from advisor.models.load import load_model
    from advisor.schemes import parse_scheme
    from advisor.workflows.texts import draw

    loaded = load_model(folder)
    calibration = draw(
        ("builtin:calibration",), loaded.tokenizer, role="calibration", sequences=given.samples,
        sequence_length=given.length, seed=0,
    )  # fmt: skip
    store = open_store(loaded, calibration, root=work, gradient="none")
    with cost() as statistics:
        collect_statistics(loaded, calibration, store, gradients=False, gradient="none")
    bench = Bench(loaded, store, parse_scheme(given.scheme), given.steps)
    ours = {}
    for name, search in (("checkpoint", bench.for_checkpoint), ("scores", bench.for_scores)):
        seconds = []
        for _ in range(given.repeat):
            with cost() as spent:
                scales = search()
            seconds.append(spent.cpu_s)
        ours[name] = (median(seconds), scales)
    theirs, found = library_cost(
        "llmcompressor", folder, given.scheme, calibration,
        {"n_grid": given.steps, "duo_scaling": "true" if given.duo else "false"},
    )  # fmt: skip
    by_names = {frozenset(names.split(",")): scales for names, scales in found.items()}
    their_scales = {
        group: by_names[names]
        for group, members in bench.groups.items()
        if (names := frozenset(linear.name for linear in members)) in by_names
    }
    print(f"{given.scheme}, {given.samples} x {given.length} tokens, {given.steps} steps"
          f"{', duo scaling' if given.duo else ''}\n")  # fmt: skip
    print("| | calibration | search | together | ratio of searches | of all | error, ours over "
          "theirs | over no scales |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    whole, alone = theirs["cpu_s"], theirs["search_cpu_s"]
    print(f"| llm-compressor, CPU s | {whole - alone:.2f} | {alone:.2f} | {whole:.2f} | | | "
          f"| {bench.beside(their_scales, None)} |")  # fmt: skip
    for name, (search_s, scales) in ours.items():
        together = statistics.cpu_s + search_s
        cells = [
            f"Advisor for {name}, CPU s", f"{statistics.cpu_s:.2f}", f"{search_s:.2f}",
            f"{together:.2f}", f"{search_s / alone:.3f}", f"{together / whole:.3f}",
            bench.beside(scales, their_scales), bench.beside(scales, None),
        ]  # fmt: skip
        print("|", " | ".join(cells), "|")


class Bench:
    """Our two searches, and the error of anyone's scales."""

    def __init__(
        self, loaded: LoadedModel, store: StatisticsStore, scheme: Scheme, steps: int
    ) -> None:
        """Share the linears out by what they read."""
        from advisor.methods.settings import QuantizationSettings
        from advisor.models.folding import foldable_groups

        self.loaded, self.store, self.scheme = loaded, store, scheme
        self.settings = QuantizationSettings(scale_steps=steps)
        self.foldable = {folding.input_group for folding in foldable_groups(loaded.model)}
        self.groups: dict[str, list[LinearSpec]] = {}
        for linear in loaded.linears:
            self.groups.setdefault(linear.input_group, []).append(linear)

    def for_checkpoint(self) -> dict[str, Tensor]:
        """Search as for final codes."""
        from advisor.search.scaling import find_scales

        chosen = {linear.name: self.scheme for linear in self.loaded.linears}
        return find_scales(
            self.loaded, chosen, self.groups, self.settings, self.store.layer, self._weight
        )

    def for_scores(self) -> dict[str, Tensor]:
        """Search as scoring does, which also rounds the weights."""
        from advisor.search.stacking import quantize_group

        found = {}
        for group, members in self.groups.items():
            if group in self.foldable:
                weights = [self._weight(linear) for linear in members]
                (result,) = quantize_group(
                    weights, self.store.layer(members[0]), [self.scheme], self.settings,
                    foldable=True, share_scales=True,
                )  # fmt: skip
                found[group] = result.scales
        return found

    def beside(self, scales: Mapping[str, Tensor], others: Mapping[str, Tensor] | None) -> str:
        """Return the geometric mean and the range of errors over others', or over no scales'."""
        ratios = []
        for group, own in scales.items():
            other = torch.ones_like(own) if others is None else others.get(group)
            if other is not None:
                ratios.append(self._error(group, own) / self._error(group, other))
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return f"{mean:.3f} [{min(ratios):.3f}, {max(ratios):.3f}], {len(ratios)} inputs"

    def _error(self, group: str, scales: Tensor) -> float:
        """Return the change of the outputs of linears rounded under these scales."""
        from advisor.methods import rtn

        members = self.groups[group]
        stacked = torch.cat([self._weight(linear) for linear in members])
        rounded = rtn.quantize_integers(stacked * scales, self.scheme, self.settings).dequantize()
        delta = (rounded / scales - stacked).double()
        moment = self.store.layer(members[0]).second_moment.double()
        return float(((delta @ moment) * delta).sum())

    def _weight(self, linear: LinearSpec) -> Tensor:
        from advisor.search.scores import module_weight

        return module_weight(self.loaded, linear)


def cut(source: Path, target: Path, blocks: int) -> Path:
    """Write a model of a Llama-like model's first blocks."""
    from safetensors import safe_open

    from advisor.models.checkpoint import read_tensor, weight_files

    target.mkdir(parents=True)
    tensors = {}
    for file in weight_files(source):
        with safe_open(file, "pt") as handle:
            names = list(handle.keys())
        for name in names:
            number = name.removeprefix("model.layers.").split(".")[0]
            if not number.isdigit() or int(number) < blocks:
                tensors[name] = read_tensor(source, name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        if "index" not in path.name:
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    changed = json.dumps(config | {"num_hidden_layers": blocks})
    (target / "config.json").write_text(changed, encoding="utf-8")
    return target


if __name__ == "__main__":
    main()
