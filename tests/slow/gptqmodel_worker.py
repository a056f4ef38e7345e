"""Run inside an environment that has gptqmodel: load one checkpoint, write its logits.

Arguments: the checkpoint's folder, a JSON file with ``prompts`` (lists of token ids), the file to
write (a torch tensor file), and ``transformers`` (through optimum) or ``gptqmodel`` (its own
loader, which alone reads ``dynamic``).
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")


def main(folder, questions, answers, loader):
    """Load the checkpoint and write the answers."""
    import torch

    with open(questions, encoding="utf-8") as handle:
        prompts = json.load(handle)["prompts"]
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.TORCH, dtype=torch.bfloat16)
        model = model.model
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    model.eval()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].float().clone() for ids in prompts]
    torch.save(logits, answers)


if __name__ == "__main__":
    main(*sys.argv[1:5])
