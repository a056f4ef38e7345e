"""AutoRound: rounding learned block by block, saved in the gptq format.

With further options, its AutoScheme chooses the scheme of each module first.
"""

import hashlib
import json
import os
import tempfile

from worker_protocol import BadJob, device_of, load_tokens, main, model_dtype, progress


def quantize(job):
    """Learn the rounding on our tokens and save as AutoRound does."""
    import torch

    torch.set_num_threads(job["threads"])
    device = device_of(job)
    settings = job["settings"]
    if job["scheme"]["method"] != "autoround":
        raise BadJob(f"this worker makes autoround, not {job['scheme']['method']!r}.")
    with tempfile.TemporaryDirectory() as scratch:
        # AutoScheme keeps its scores, by the model's folder name alone, in the user's cache.
        os.environ["AR_AUTO_SCHEME_CACHE"] = scratch
        from auto_round import AutoRound
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokens = load_tokens(job)
        progress("Loading", 0, 1)
        dtype = getattr(torch, model_dtype(job["model"]))
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).eval()
        tokenizer = AutoTokenizer.from_pretrained(job["model"])
        progress("Loading", 1, 1)
        if job["options"]:
            scheme, dataset = auto_scheme(job, tokens, device), offer(tokens)
        else:
            scheme, dataset = arguments(job["scheme"]), [torch.tensor([ids]) for ids in tokens]
        rounding = AutoRound(
            model,
            tokenizer,
            scheme=scheme,
            dataset=dataset,
            iters=settings["iters"],
            lr=settings["lr"] or None,
            nsamples=len(tokens),
            seqlen=len(tokens[0]),
            batch_size=settings["batch_size"],
            device_map=device,
            seed=job["seed"],
            enable_torch_compile=False,
            trust_remote_code=False,
        )
        progress("Quantizing", 0, 1)
        rounding.quantize_and_save(job["output"], format="auto_gptq")
    move_up(job["output"])
    progress("Quantizing", 1, 1)
    return ()


def arguments(scheme):
    """Return a scheme as AutoRound takes it."""
    return {
        "bits": int(scheme["bits"]),
        "group_size": scheme["group_size"] if scheme["granularity"] == "group" else -1,
        "sym": scheme["symmetric"] is not False,
        "data_type": "int",
    }


def auto_scheme(job, tokens, device):
    """Return AutoRound's own choice among the options, module by module, at our average."""
    from auto_round import AutoScheme
    from auto_round.schemes import QuantizationScheme

    options = []
    for option in (job["scheme"], *job["options"]):
        kept = option["method"] == "bf16"
        options.append("BF16" if kept else QuantizationScheme(act_bits=16, **arguments(option)))
    return AutoScheme(
        avg_bits=job["settings"]["target_bits"],
        options=options,
        shared_layers=job["together"] or None,
        nsamples=len(tokens),
        seqlen=len(tokens[0]),
        batch_size=job["settings"]["batch_size"],
        device_map=device,
        enable_torch_compile=False,
    )


def offer(tokens):
    """Give AutoRound our tokens under a name: AutoScheme takes no others than named data sets."""
    import torch
    from auto_round import calib_dataset
    from auto_round.auto_scheme import delta_loss

    def loader(tokenizer, seqlen, dataset_name=None, seed=0, bs=8, nsamples=None):
        rows = torch.tensor(tokens[:nsamples])[:, :seqlen]
        return [
            {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(bs)
        ]

    calib_dataset.get_dataloader = delta_loss.get_dataloader = loader
    return "advisor-" + hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]


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
