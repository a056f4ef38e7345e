"""Run the worker of a library that asks for CUDA on the CPU: its own code but for the device.

Runs inside the library's environment. AutoGPTQ's device is replaced by the CPU and torch says that
there is CUDA while AutoGPTQ asks; AutoAWQ takes the CPU by itself once the worker lets it.
"""

import importlib
import json
import sys
from pathlib import Path

WORKERS = Path(__file__).parents[2] / "advisor" / "backends" / "workers"


def run() -> None:
    """Do the job with the worker that it names."""
    name = json.loads(Path(sys.argv[1]).read_text())["backend"]
    sys.path.insert(0, str(WORKERS))
    worker = importlib.import_module("worker_" + name.replace("-", "_"))
    worker.device_of = lambda job: "cuda"
    worker.main(name, quantize_with(name, worker.quantize))


def quantize_with(name, quantize):
    """Return the worker's function with the library prepared first."""

    def prepared(job):
        import torch

        torch.set_num_threads(job["threads"])
        if name == "auto-gptq":
            import auto_gptq.modeling._base as base

            torch.cuda.is_available = lambda: True
            torch.cuda.synchronize = torch.cuda.empty_cache = lambda: None
            base.CUDA_0 = base.CPU
        return quantize(job)

    return prepared


run()
