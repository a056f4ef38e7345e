"""Run inside an environment that has auto-gptq or autoawq: load one checkpoint, write its logits.

Arguments: the checkpoint's folder, a JSON file with ``prompts`` (lists of token ids), the file to
write (a torch tensor file), and ``auto-gptq`` or ``autoawq``. Both libraries' last releases.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(folder, questions, answers, library):
    """Load the checkpoint and write the answers."""
    import torch

    with open(questions, encoding="utf-8") as handle:
        prompts = json.load(handle)["prompts"]
    if library == "auto-gptq":
        from auto_gptq import AutoGPTQForCausalLM

        model = AutoGPTQForCausalLM.from_quantized(
            folder,
            device="cpu",
            use_safetensors=True,
            use_triton=False,
            disable_exllama=True,
            disable_exllamav2=True,
            inject_fused_attention=False,
            inject_fused_mlp=False,
            torch_dtype=torch.float32,
        ).model
    else:
        import awq.models.base
        from awq import AutoAWQForCausalLM

        # On a CPU it asks for Intel's extension, whose releases have ended; its own product in
        # plain torch, which it falls back to without CUDA kernels, is what we want here.
        awq.models.base.get_best_device = lambda: "cuda:0"
        model = AutoAWQForCausalLM.from_quantized(
            folder, fuse_layers=False, device_map={"": "cpu"}, torch_dtype=torch.float16
        ).model
    model.eval()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].float().clone() for ids in prompts]
    torch.save(logits, answers)


if __name__ == "__main__":
    main(*sys.argv[1:5])
