"""A whole search beside one quantization of a library, on the same tokens: CPU seconds, one thread.

    python tests/bench/search_cost.py MODEL --work FOLDER --max-size 118MB --warm-size 116MB
        [--library gptqmodel] [--scheme gptq-int4-g32-sym] [--full]

Four commands, one after the other, as a user types them: ``advisor backends run`` with the library
(its quantization, and what it is worth on held-out text), ``advisor tune --effort quick`` from
nothing, the same for another size with what the first has left in the cache, and ``advisor tune``
with ``--full``. Imports and all else count; children count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from cpu_cost import cost, one_thread


def main() -> None:
    """Run the commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--max-size", required=True)
    parser.add_argument("--warm-size", required=True)
    parser.add_argument("--library", default="gptqmodel")
    parser.add_argument("--scheme", default="gptq-int4-g32-sym")
    parser.add_argument("--calibration", default="builtin:calibration")
    parser.add_argument("--gpu", default="rtx-4090")
    parser.add_argument("--full", action="store_true", help="also a full search, from nothing")
    given = parser.parse_args()
    one_thread()
    given.work.mkdir(parents=True)  # nothing may be known beforehand
    common = [str(given.model), "--gpu", given.gpu, "--engine", "vllm",
              "--calibration", given.calibration]  # fmt: skip
    library = ["backends", "run", given.library, *common, "--scheme", given.scheme,
               "-o", str(given.work / "library"), "--device", "cpu"]  # fmt: skip
    theirs = _cost(library, given.work / "cache-library")
    print("| command | CPU s | times the library's |\n| --- | --- | --- |")
    print(f"| {given.library} {given.scheme} | {theirs:.0f} | 1 |", flush=True)
    jobs = [("quick", "quick", given.max_size, "cache"),
            ("quick, warm", "quick", given.warm_size, "cache")]  # fmt: skip
    if given.full:
        jobs.append(("full", "full", given.max_size, "cache-full"))
    for name, effort, size, cache in jobs:
        plan = given.work / f"{name.replace(', ', '-')}.yaml"
        search = ["tune", *common, "--max-size", size, "--effort", effort, "--device", "cpu",
                  "-o", str(plan)]  # fmt: skip
        seconds = _cost(search, given.work / cache)
        print(f"| tune --effort {name} | {seconds:.0f} | {seconds / theirs:.2f} |", flush=True)


def _cost(arguments: list[str], cache: Path) -> float:
    """Return the CPU seconds of a command."""
    command = [sys.executable, "-m", "advisor", *arguments]
    with cost() as found:
        done = subprocess.run(command, env=os.environ | {"ADVISOR_CACHE": str(cache)}, check=False)
    if done.returncode not in (0, 3):  # 3: nothing measured meets the budgets
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}")
    return found.cpu_s


if __name__ == "__main__":
    main()
