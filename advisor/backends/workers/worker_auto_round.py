"""AutoRound: rounding learned block by block, saved in the gptq format."""

import os

from worker_protocol import BadJob, device_of, load_tokens, main, model_dtype, progress


def quantize(job):
    """Learn the rounding on our tokens and save as AutoRound does."""
    import torch

    torch.set_num_threads(job["threads"])
    device = device_of(job)
    scheme, settings = job["scheme"], job["settings"]
    if scheme["method"] != "autoround":
        raise BadJob(f"this worker makes autoround, not {scheme['method']!r}.")
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = load_tokens(job)
    progress("Loading", 0, 1)
    dtype = getattr(torch, model_dtype(job["model"]))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    progress("Loading", 1, 1)
    rounding = AutoRound(
        model,
        tokenizer,
        scheme={
            "bits": int(scheme["bits"]),
            "group_size": scheme["group_size"] if scheme["granularity"] == "group" else -1,
            "sym": scheme["symmetric"] is not False,
            "data_type": "int",
        },
        dataset=[torch.tensor([ids]) for ids in tokens],
        iters=settings["iters"],
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=settings["batch_size"],
        device_map=device,
        seed=job["seed"],
        enable_torch_compile=False,
    )
    progress("Quantizing", 0, 1)
    rounding.quantize_and_save(job["output"], format="auto_gptq")
    move_up(job["output"])
    progress("Quantizing", 1, 1)
    return ()


def move_up(folder):
    """Move what AutoRound saved into a folder of its own naming to where it was to be."""
    if os.path.isfile(os.path.join(folder, "config.json")):
        return
    for name in os.listdir(folder):
        inner = os.path.join(folder, name)
        if os.path.isfile(os.path.join(inner, "config.json")):
            for file in os.listdir(inner):
                os.replace(os.path.join(inner, file), os.path.join(folder, file))
            os.rmdir(inner)


if __name__ == "__main__":
    main("auto-round", quantize)
