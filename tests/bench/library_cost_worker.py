"""CPU seconds that a library itself spends on a job of ``advisor backends``: imports not counted.

    PYTHON_OF_THE_LIBRARY library_cost_worker.py ADVISOR/backends/workers JOB.json COST.json

Runs the backend's own worker, with a clock around the library's call (gptqmodel's ``quantize``,
llm-compressor's ``oneshot``): its calibration pass, its quantization, and for GPTQModel packing are
in; loading, saving and imports are not. Of llm-compressor's AWQ also what the scale search alone
took, and the scales that it found (COST.scales.safetensors, by the name of the scaled linears'
input, joined by commas).
"""

import importlib
import json
import sys
import time


class Clock:
    """CPU seconds of this process, all threads, inside wrapped calls."""

    def __init__(self):
        """Start at nothing."""
        self.seconds = 0.0

    def around(self, function):
        """Return the function, timed."""

        def timed(*arguments, **named):
            start = time.process_time()
            try:
                return function(*arguments, **named)
            finally:
                self.seconds += time.process_time() - start

        return timed


def main():
    """Run the worker and leave its cost."""
    workers, path, target = sys.argv[1:]
    sys.path.insert(0, workers)
    with open(path, encoding="utf-8") as handle:
        job = json.load(handle)
    whole, search, scales = Clock(), Clock(), {}
    {"gptqmodel": watch_gptqmodel, "llmcompressor": watch_llmcompressor}[job["backend"]](
        whole, search, scales
    )
    worker = importlib.import_module(f"worker_{job['backend']}")
    worker.quantize(job)
    if scales:
        from safetensors.torch import save_file

        save_file(scales, target.replace(".json", ".scales.safetensors"))
    with open(target, "w", encoding="utf-8") as handle:
        json.dump({"cpu_s": whole.seconds, "search_cpu_s": search.seconds}, handle)


def watch_gptqmodel(whole, search, scales):
    """Time ``quantize`` of whatever model is loaded."""
    del search, scales
    import os

    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel

    load = GPTQModel.load

    def loading(*arguments, **named):
        model = load(*arguments, **named)
        model.quantize = whole.around(model.quantize)
        return model

    GPTQModel.load = loading


def watch_llmcompressor(whole, search, scales):
    """Time ``oneshot``, and AWQ's search in it."""
    import llmcompressor
    from llmcompressor.modifiers.transform.awq import AWQModifier

    llmcompressor.oneshot = whole.around(llmcompressor.oneshot)
    AWQModifier._apply_smoothing = search.around(AWQModifier._apply_smoothing)
    original = AWQModifier._compute_best_scale

    def best(self, mapping, *arguments, **named):
        found = original(self, mapping, *arguments, **named)
        scales[",".join(mapping.balance_names)] = found.float().contiguous()
        return found

    AWQModifier._compute_best_scale = best


if __name__ == "__main__":
    main()
