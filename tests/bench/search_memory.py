"""One whole search in a process of its own: its peak memory by stage, as JSON on stdout.

Usage: python search_memory.py MODEL OUTPUT [--trials N] [--samples N] [--max-size SIZE] ...

Memory is what is resident. What a process allocated itself (``anonymous``) must stay; pages of
files (libraries, mapped weights, hidden states on disk: ``file``) the kernel may drop at any time,
as it can read them again. Their sum is exact at its peak (VmHWM), the two are sampled.
"""

from __future__ import annotations

import argparse
import json
import threading
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


class Sampler:
    """Watches what is resident, by kind, from a thread of its own."""

    def __init__(self, every_seconds: float = 0.005) -> None:
        """Start to watch."""
        self.peaks = {"anonymous": 0, "file": 0}
        self._every = every_seconds
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            now = kinds()
            self.peaks = {kind: max(self.peaks[kind], now[kind]) for kind in now}
            time.sleep(self._every)

    def take(self) -> dict[str, int]:
        """Return the peaks since the last call."""
        found, self.peaks = self.peaks, kinds()
        return found


def kinds() -> dict[str, int]:
    """Return bytes resident now, by kind."""
    file = resident("RssFile") + resident("RssShmem")
    return {"anonymous": resident("RssAnon"), "file": file}


def main() -> None:
    """Search, and print what each stage took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--max-size", default=None)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--evaluation-sequences", type=int, default=32)
    given = parser.parse_args()

    import torch
    import transformers

    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM
    baseline = resident("VmRSS")
    base_kinds = kinds()
    sampler = Sampler()

    from advisor import workflows
    from advisor.budgets import Budgets
    from advisor.search import run as search_run

    predicted: list[int] = []
    check = getattr(search_run, "check_memory", None)
    if check is not None:  # an older checkout predicts nothing
        search_run.check_memory = lambda use: (predicted.append(use.peak), check(use))

    stages: dict[str, int] = {}
    by_kind: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    current = ["Loading"]
    since = [time.process_time()]

    def leave(name: str) -> None:
        old = current[0]
        stages[old] = max(stages.get(old, 0), resident())
        before = by_kind.get(old, {"anonymous": 0, "file": 0})
        by_kind[old] = {kind: max(before[kind], most) for kind, most in sampler.take().items()}
        seconds[old] = seconds.get(old, 0.0) + time.process_time() - since[0]
        reset_peak()
        current[0], since[0] = name, time.process_time()

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
                "baseline_kinds": base_kinds,
                "peak": max(stages.values()),
                "predicted_peak": predicted[0] if predicted else None,
                "stages": stages,
                "stages_by_kind": by_kind,
                "stages_cpu_seconds": seconds,
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
