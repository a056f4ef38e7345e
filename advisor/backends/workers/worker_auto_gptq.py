"""AutoGPTQ 0.7.1, which quantizes on CUDA devices only: GPTQ, saved in the format of that name."""

import os
import tempfile

from worker_protocol import (
    BadJob,
    device_of,
    keep_config,
    load_tokens,
    main,
    older_copy,
    progress,
    refuse_own_code,
)


def quantize(job):
    """Quantize on our tokens and save as AutoGPTQ does."""
    refuse_own_code(job)  # its from_pretrained trusts whatever code a folder brings
    import torch

    torch.manual_seed(job["seed"])
    if device_of(job) != "cuda":
        raise BadJob("auto-gptq quantizes on CUDA devices only, and torch sees none here.")
    scheme, settings = job["scheme"], job["settings"]
    if scheme["method"] != "gptq":
        raise BadJob(f"this worker makes gptq, not {scheme['method']!r}.")
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    configuration = BaseQuantizeConfig(
        bits=int(scheme["bits"]),
        group_size=scheme["group_size"] if scheme["granularity"] == "group" else -1,
        damp_percent=settings["damp_percent"],
        desc_act=scheme["activation_order"],
        static_groups=settings["static_groups"],
        sym=scheme["symmetric"] is not False,
    )
    progress("Loading", 0, 1)
    with tempfile.TemporaryDirectory() as scratch:
        model = AutoGPTQForCausalLM.from_pretrained(older_copy(job, scratch), configuration)
    progress("Loading", 1, 1)
    rows = [
        {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=int)}
        for ids in load_tokens(job)
    ]
    progress("Quantizing", 0, 1)
    model.quantize(rows, batch_size=1)
    progress("Quantizing", 1, 1)
    progress("Saving", 0, 1)
    model.save_quantized(job["output"], use_safetensors=True)
    finish(job)
    progress("Saving", 1, 1)
    return ()


def finish(job):
    """Make the folder one that loaders take: they look for other names than AutoGPTQ writes.

    The weight file gets the usual name, and is_marlin_format goes: transformers hands every key on
    to a quantizer that knows none of that name. quantize_config.json says the same once more.
    """
    folder = job["output"]
    files = [name for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
    if len(files) == 1 and files[0] != "model.safetensors":
        os.rename(os.path.join(folder, files[0]), os.path.join(folder, "model.safetensors"))
    os.remove(os.path.join(folder, "quantize_config.json"))
    keep_config(job, dropped=["is_marlin_format", "model_name_or_path", "model_file_base_name"])


if __name__ == "__main__":
    main("auto-gptq", quantize)
