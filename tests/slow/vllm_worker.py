"""Run inside an environment that has vLLM: load one checkpoint, print what it says of token ids.

Arguments: the checkpoint's folder, a JSON file with ``prompts`` (lists of token ids), the JSON file
to write: log-probability of each prompt token after the first, and greedy continuations.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main(folder, questions, answers):
    """Load the checkpoint and write the answers."""
    from vllm import LLM, SamplingParams

    with open(questions, encoding="utf-8") as handle:
        prompts = json.load(handle)["prompts"]
    model = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=512,
        enforce_eager=True,
        max_num_seqs=2,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=16, prompt_logprobs=0)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    result = []
    for ids, output in zip(prompts, outputs, strict=True):
        logprobs = [
            entry[token].logprob
            for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
        result.append({"logprobs": logprobs, "greedy": list(output.outputs[0].token_ids)})
    with open(answers, "w", encoding="utf-8") as handle:
        json.dump(result, handle)


if __name__ == "__main__":
    main(*sys.argv[1:4])
