"""HQQ through its own HQQLinear; the weights are written back in 16 bits.

HQQ's zero points are fractions. No format that servers share holds them, and HQQ's own files are
pickles: the checkpoint has the dequantized weights, in the model's own layout.
"""

import os
import shutil

from worker_protocol import BadJob, device_of, main, model_dtype, progress

_KEPT = ("lm_head",)


def quantize(job):
    """Quantize each linear by itself and save the model with what it then holds."""
    import torch

    torch.set_num_threads(job["threads"])
    device = device_of(job)
    scheme = job["scheme"]
    if scheme["method"] != "hqq":
        raise BadJob(f"this worker makes hqq, not {scheme['method']!r}.")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM

    progress("Loading", 0, 1)
    dtype = getattr(torch, model_dtype(job["model"]))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    progress("Loading", 1, 1)
    configuration = BaseQuantizeConfig(
        nbits=int(scheme["bits"]), group_size=scheme["group_size"], axis=1
    )
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in _KEPT
    ]
    stored = 0
    for done, (_, module) in enumerate(linears, start=1):
        quantized = HQQLinear(
            module, configuration, compute_dtype=dtype, device=device, del_orig=False
        )
        stored += stored_bytes(quantized)
        with torch.no_grad():
            module.weight.copy_(quantized.dequantize().to(module.weight.device))
        progress("Quantizing", done, len(linears))
    progress("Saving", 0, 1)
    save(model, job["model"], job["output"])
    progress("Saving", 1, 1)
    count = len(linears)
    return [f"as HQQ holds them, the {count} quantized weights would take {stored} bytes"]


def stored_bytes(quantized):
    """Return the bytes of one weight's codes, scales and zero points as HQQ holds them."""
    tensors = [quantized.W_q, quantized.meta.get("scale"), quantized.meta.get("zero")]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if hasattr(tensor, "numel")
    )


def save(model, source, output):
    """Save weights as transformers does, with the source's own configuration."""
    model.save_pretrained(output)
    shutil.copyfile(os.path.join(source, "config.json"), os.path.join(output, "config.json"))


if __name__ == "__main__":
    main("hqq", quantize)
