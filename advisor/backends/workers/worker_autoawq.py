"""AutoAWQ 0.2.9, which quantizes on CUDA devices only: AWQ, saved in the format of that name."""

import tempfile

from worker_protocol import (
    BadJob,
    device_of,
    keep_config,
    load_tokens,
    main,
    older_copy,
    progress,
)


def quantize(job):
    """Quantize on our tokens and save as AutoAWQ does."""
    import torch

    torch.manual_seed(job["seed"])
    if device_of(job) != "cuda":
        raise BadJob("autoawq quantizes on CUDA devices only, and torch sees none here.")
    scheme, settings = job["scheme"], job["settings"]
    if scheme["method"] != "awq":
        raise BadJob(f"this worker makes awq, not {scheme['method']!r}.")
    from awq import AutoAWQForCausalLM

    tokens = load_tokens(job)
    progress("Loading", 0, 1)
    with tempfile.TemporaryDirectory() as scratch:
        model = AutoAWQForCausalLM.from_pretrained(
            older_copy(job, scratch), safetensors=True, trust_remote_code=False
        )
    progress("Loading", 1, 1)
    progress("Quantizing", 0, 1)
    model.quantize(
        None,  # the tokens are ours; transformers 4 may not read a tokenizer that 5 has saved
        quant_config={
            "zero_point": True,
            "q_group_size": scheme["group_size"],
            "w_bit": int(scheme["bits"]),
            "version": "GEMM",
        },
        # Lists of token ids are taken as they are, laid end to end and cut at max_calib_seq_len.
        calib_data=tokens,
        max_calib_samples=len(tokens),
        max_calib_seq_len=len(tokens[0]),
        duo_scaling=settings["duo_scaling"],
        apply_clip=settings["apply_clip"],
    )
    progress("Quantizing", 1, 1)
    progress("Saving", 0, 1)
    model.save_quantized(job["output"], safetensors=True)
    keep_config(job)
    progress("Saving", 1, 1)
    return ()


if __name__ == "__main__":
    main("autoawq", quantize)
