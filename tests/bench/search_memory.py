"""One whole search in a process of its own: its peak memory by stage, as JSON on stdout.

Usage: python search_memory.py MODEL OUTPUT [--trials N] [--samples N] [--max-size SIZE] ...
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident(field: str = "VmHWM") -> int:
    """Return bytes resident in this process: now (VmRSS) or at most since the last reset."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}")


def reset_peak() -> None:
    """Let the peak begin again at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Search, and print what each stage took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-size", default=None)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--evaluation-sequences", type=int, default=16)
    given = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM
    baseline = resident("VmRSS")

    from advisor import workflows
    from advisor.budgets import Budgets

    stages: dict[str, int] = {}
    seconds: dict[str, float] = {}
    current = ["Loading"]
    since = [time.monotonic()]

    def leave(name: str) -> None:
        old = current[0]
        stages[old] = max(stages.get(old, 0), resident())
        seconds[old] = seconds.get(old, 0.0) + time.monotonic() - since[0]
        reset_peak()
        current[0], since[0] = name, time.monotonic()

    def progress(event: workflows.ProgressEvent) -> None:
        name = event.stage.split(":")[0].split(" ")[0]
        if name != current[0]:
            leave(name)

    started = time.monotonic()
    found = workflows.tune(
        given.model, gpu="cpu", engine="vllm", context=1024,
        budgets=Budgets.from_text(max_size=given.max_size),
        output=given.output, trials=given.trials, samples=given.samples,
        sequence_length=given.sequence_length, evaluation_sequences=given.evaluation_sequences,
        progress=progress,
    )  # fmt: skip
    total = time.monotonic() - started
    leave("end")
    print(
        json.dumps(
            {
                "baseline": baseline,
                "peak": max(stages.values()),
                "stages": stages,
                "seconds": seconds,
                "total_seconds": total,
                "cpu_seconds": time.process_time(),
                "finalists": [
                    [f.name, f.mixture.family.method, f.mixture.family.sequential,
                     f.mixture.size_bytes, float(f.measurement.sequence_kl.mean())]
                    for f in found.result.finalists
                ],
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
