"""AWQ's scale search for a whole model: ours beside llm-compressor's, cost and error: a table.

    python tests/bench/awq_cost.py MODEL [--scheme awq-int4-g64-asym] [--samples 32] [--length 256]
        [--steps 20] [--duo] [--blocks N]

Both see the same tokens and try as many exponents of the mean magnitude of the inputs (theirs i/N,
ours i/(N-1); ``--duo`` lets theirs also divide by the weights' magnitudes, its default). CPU
seconds in one thread: ours are the statistics (one forward pass, which any other candidate shares)
and the search; theirs the ``oneshot`` call with its calibration, and its search alone. The error of
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
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics
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
    from advisor.methods.settings import QuantizationSettings
    from advisor.models.load import load_model
    from advisor.schemes import parse_scheme
    from advisor.search.scaling import find_scales
    from advisor.search.scores import module_weight
    from advisor.workflows.texts import draw

    loaded = load_model(folder)
    calibration = draw(
        (), loaded.tokenizer, role="calibration", sequences=given.samples,
        sequence_length=given.length, seed=0,
    )  # fmt: skip
    scheme = parse_scheme(given.scheme)
    store = open_store(loaded, calibration, root=work, gradient="none")
    with cost() as statistics:
        collect_statistics(loaded, calibration, store, gradients=False, gradient="none")
    chosen = {linear.name: scheme for linear in loaded.linears}
    groups: dict[str, list] = {}
    for linear in loaded.linears:
        groups.setdefault(linear.input_group, []).append(linear)
    settings = QuantizationSettings(scale_steps=given.steps)
    seconds = []
    for _ in range(given.repeat):
        with cost() as spent:
            ours = find_scales(
                loaded, chosen, groups, settings, store.layer,
                lambda linear: module_weight(loaded, linear),
            )  # fmt: skip
        seconds.append(spent.cpu_s)
    duo = "true" if given.duo else "false"
    spent_there, found = library_cost(
        "llmcompressor", folder, given.scheme, calibration,
        {"n_grid": given.steps, "duo_scaling": duo},
    )  # fmt: skip
    theirs = {frozenset(names.split(",")): scales for names, scales in found.items()}
    ratios, plain = [], []
    for group, members in groups.items():
        their = theirs.get(frozenset(linear.name for linear in members))
        if group not in ours or their is None:
            continue
        weights = [module_weight(loaded, linear) for linear in members]
        known = store.layer(members[0])
        error = [_error(weights, known, scheme, s) for s in (ours[group], their)]
        ratios.append(error[0] / error[1])
        plain.append(error[0] / _error(weights, known, scheme, torch.ones_like(their)))
    _print(given, statistics.cpu_s, median(seconds), spent_there, ratios, plain, len(groups))


def _error(
    weights: Sequence[Tensor], statistics: LayerStatistics, scheme: Scheme, scales: Tensor
) -> float:
    """Return the change of the outputs of linears rounded under these scales."""
    from advisor.methods import rtn
    from advisor.methods.settings import QuantizationSettings

    stacked = torch.cat(list(weights))
    rounded = rtn.quantize_integers(stacked * scales, scheme, QuantizationSettings()).dequantize()
    delta = (rounded / scales - stacked).double()
    return float(((delta @ statistics.second_moment.double()) * delta).sum())


def _print(
    given: argparse.Namespace,
    statistics: float,
    search: float,
    theirs: Mapping[str, float],
    ratios: Sequence[float],
    plain: Sequence[float],
    groups: int,
) -> None:
    print(f"{given.scheme}, {given.samples} x {given.length} tokens, {given.steps} steps, "
          f"{len(ratios)} of {groups} input groups scaled by both"
          f"{', with duo scaling' if given.duo else ''}\n")  # fmt: skip
    print("| | calibration | search | together |")
    print("|---|---|---|---|")
    print(f"| Advisor, CPU s | {statistics:.2f} | {search:.2f} | {statistics + search:.2f} |")
    whole, alone = theirs["cpu_s"], theirs["search_cpu_s"]
    print(f"| llm-compressor, CPU s | {whole - alone:.2f} | {alone:.2f} | {whole:.2f} |")
    print(f"| ratio | | {search / alone:.3f} | {(statistics + search) / whole:.3f} |")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    better = math.exp(sum(map(math.log, plain)) / len(plain))
    print(f"\nError of our scales over theirs: geometric mean {mean:.3f}, "
          f"{min(ratios):.3f} to {max(ratios):.3f}; over no scales {better:.3f}.")  # fmt: skip


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
