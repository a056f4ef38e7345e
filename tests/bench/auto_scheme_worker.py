"""AutoScheme of auto-round: bits per module from its own scores, in that library's environment.

    PYTHON_OF_AUTO_ROUND auto_scheme_worker.py JOB.json

The job is one of ``advisor backends`` (see ``advisor/backends/workers/worker_protocol.py``) with
``avg_bits`` and ``options`` among the settings. AutoScheme takes no tokens: ours are given to it as
a data set of its own registry.
"""

import json
import os
import sys


def main():
    """Choose bits, learn the rounding, save as GPTQ with a setting for each module."""
    with open(sys.argv[1], encoding="utf-8") as handle:
        job = json.load(handle)
    with open(job["tokens"], encoding="utf-8") as handle:
        tokens = json.load(handle)
    os.environ["AR_DISABLE_DATASET_SUBPROCESS"] = "1"  # a child would not know our data set
    import torch

    torch.set_num_threads(job["threads"])
    from auto_round import AutoRound, AutoScheme
    from auto_round.calib_dataset import register_dataset
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    @register_dataset("given-tokens")
    def given(*arguments, **named):
        rows = {"input_ids": tokens, "attention_mask": [[1] * len(ids) for ids in tokens]}
        found = Dataset.from_dict(rows)
        found.set_format("torch")
        return found

    settings = job["settings"]
    shape = {"nsamples": len(tokens), "seqlen": len(tokens[0])}
    scheme = AutoScheme(
        avg_bits=settings["avg_bits"],
        options=settings["options"],
        batch_size=1,
        device_map="cpu",
        enable_torch_compile=False,
        low_gpu_mem_usage=False,
        **shape,
    )
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job["model"]),
        scheme=scheme,
        dataset="given-tokens",
        iters=settings["iters"],
        batch_size=settings["batch_size"],
        device_map="cpu",
        seed=job["seed"],
        enable_torch_compile=False,
        **shape,
    )
    rounding.quantize_and_save(job["output"], format="auto_gptq")


if __name__ == "__main__":
    main()
