"""Peak memory of a whole search: flat as blocks are added, and small beside a real model.

    pytest -m bench tests/bench/test_memory.py -s

``ADVISOR_BENCH_MODEL`` names the folder of a 16-bit model that is large compared with what torch
takes (a few hundred MB); its ratio is measured then. ``ADVISOR_BENCH_OTHER`` names another
checkout of Advisor; the same searches are run with it, for the ratio of times and memory.
``ADVISOR_BENCH_HIDDEN`` sets the width of the random models.

Each search is a process of its own. Memory is what is resident at most (VmHWM; getrusage would
count what the parent had), less what importing torch and transformers takes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(0),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc"),
]

BLOCKS = (4, 8, 16, 30)
HIDDEN = int(os.environ.get("ADVISOR_BENCH_HIDDEN", "384"))
ROOT = Path(__file__).parents[2]


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model's 16-bit weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def to_bf16(folder: Path) -> Path:
    path = folder / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def search(folder: Path, work: Path, *, source: Path = ROOT, options: tuple[str, ...] = ()) -> dict:
    """Run a whole search in a process of its own."""
    size = int(0.45 * weight_bytes(folder))
    script = Path(__file__).with_name("search_memory.py")
    environment = os.environ | {
        "PYTHONPATH": str(source), "ADVISOR_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(script), str(folder), str(work / "plan.yaml"),
               "--max-size", str(size), *options]  # fmt: skip
    work.mkdir(parents=True)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=7200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def show(name: str, found: dict, weights: int, other: dict | None) -> None:
    above = found["peak"] - found["baseline"]
    line = (
        f"{name:<12}{weights / 1e6:>9.1f} MB{above / 1e6:>9.1f} MB{above / weights:>8.2f}x"
        f"{found['cpu_seconds']:>8.0f} s"
    )
    if other is not None:
        more = other["peak"] - other["baseline"]
        line += (
            f"{more / 1e6:>9.1f} MB{more / weights:>8.2f}x{other['cpu_seconds']:>8.0f} s"
            f"{found['cpu_seconds'] / other['cpu_seconds']:>8.2f}"
        )
    print(line)


HEADER = (
    f"\n{'model':<12}{'weights':>12}{'above base':>12}{'ratio':>9}{'CPU':>10}"
    f"{'other: above':>14}{'ratio':>7}{'CPU':>10}{'time':>8}"
)


def beside(folder: Path, work: Path, options: tuple[str, ...]) -> tuple[dict, dict | None]:
    """Search with this checkout, and with the other where one is given."""
    found = search(folder, work / "this", options=options)
    other = os.environ.get("ADVISOR_BENCH_OTHER")
    if other is None:
        return found, None
    return found, search(folder, work / "other", source=Path(other), options=options)


def test_memory_is_flat_as_blocks_are_added(llama_builder, tmp_path):
    options = ("--trials", "2", "--samples", "8", "--sequence-length", "64",
               "--evaluation-sequences", "8")  # fmt: skip
    peaks, sizes = [], []
    print(HEADER)
    for blocks in BLOCKS:
        folder = to_bf16(
            llama_builder(
                f"llama-{blocks}", num_hidden_layers=blocks, hidden_size=HIDDEN,
                intermediate_size=8 * HIDDEN // 3 // 64 * 64, num_attention_heads=HIDDEN // 64,
                num_key_value_heads=HIDDEN // 64,
            )
        )  # fmt: skip
        found, other = beside(folder, tmp_path / str(blocks), options)
        show(f"{blocks} blocks", found, weight_bytes(folder), other)
        peaks.append(found["peak"] - found["baseline"])
        sizes.append(weight_bytes(folder))
        assert 0.6 < found["peak"] / found["predicted_peak"] <= 1.0
    growth = (peaks[-1] - peaks[0]) / (sizes[-1] - sizes[0])
    print(f"growth per byte of added 16-bit weights: {growth:.2f}")
    assert growth < 0.25


@pytest.mark.skipif("ADVISOR_BENCH_MODEL" not in os.environ, reason="no ADVISOR_BENCH_MODEL")
def test_memory_beside_a_real_model(tmp_path):
    folder = Path(os.environ["ADVISOR_BENCH_MODEL"])
    found, other = beside(folder, tmp_path, ())
    print(HEADER)
    show(folder.name[:12], found, weight_bytes(folder), other)
    for stage, peak in sorted(found["stages"].items(), key=lambda row: -row[1]):
        kinds, base = found["stages_by_kind"][stage], found["baseline_kinds"]
        print(
            f"  {stage:<14}{(peak - found['baseline']) / 1e6:>9.1f} MB"
            + "".join(f", {kind} {(kinds[kind] - base[kind]) / 1e6:.1f}" for kind in kinds)
            + f", {found['stages_cpu_seconds'][stage]:.1f} s"
        )
    print(f"predicted {found['predicted_peak'] / 1e6:.0f} MB, was {found['peak'] / 1e6:.0f} MB")
    assert found["peak"] - found["baseline"] <= 1.5 * weight_bytes(folder)
    assert 0.6 < found["peak"] / found["predicted_peak"] <= 1.05
    if other is not None:
        # The same computation: what was measured is the same, but for the order in which float64
        # sums over the tokens of a sequence are added.
        for ours, theirs in zip(found["finalists"], other["finalists"], strict=True):
            assert ours[:-1] == theirs[:-1]
            assert ours[-1] == pytest.approx(theirs[-1], rel=1e-9)
        assert found["cpu_seconds"] <= 1.15 * other["cpu_seconds"]
