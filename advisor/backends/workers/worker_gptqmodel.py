"""GPTQModel: GPTQ and, where there is CUDA, AWQ, saved in the formats of the same names."""

import os

from worker_protocol import BadJob, device_of, load_tokens, main, model_dtype, progress


def quantize(job):
    """Quantize on our tokens and save as GPTQModel does."""
    # Two workers at least: with the one that it takes by default on two cores it fails.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, job["threads"])))
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    device = device_of(job)
    if job["scheme"]["method"] == "awq" and device == "cpu":
        raise BadJob("gptqmodel's AWQ needs a CUDA device, and torch sees none here.")
    from gptqmodel import GPTQModel

    progress("Loading", 0, 1)
    dtype = getattr(torch, model_dtype(job["model"]))
    model = GPTQModel.load(job["model"], configuration_of(job, device), dtype=dtype)
    progress("Loading", 1, 1)
    model.layer_callback = Progress(model.model.config.num_hidden_layers)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in load_tokens(job)]
    # Equally long and whole: neither sorted nor cut.
    model.quantize(rows, batch_size=1, calibration_sort=None, calibration_data_min_length=2)
    progress("Saving", 0, 1)
    model.save(job["output"])
    progress("Saving", 1, 1)
    return ()


def configuration_of(job, device):
    """Return GPTQModel's configuration of the scheme."""
    scheme, settings = job["scheme"], job["settings"]
    common = {
        "bits": int(scheme["bits"]),
        "group_size": scheme["group_size"] if scheme["granularity"] == "group" else -1,
        "sym": scheme["symmetric"] is not False,
        "device": device,
    }
    if scheme["method"] == "awq":
        from gptqmodel.quantization.config import AWQConfig

        return AWQConfig(**common)
    if scheme["method"] != "gptq":
        raise BadJob(f"this worker makes gptq and awq, not {scheme['method']!r}.")
    from gptqmodel.quantization.config import GPTQConfig

    return GPTQConfig(
        **common,
        desc_act=scheme["activation_order"],
        act_group_aware=settings["act_group_aware"] and not scheme["activation_order"],
        damp_percent=settings["damp_percent"],
        mse=settings["mse"],
        offload_to_disk=False,
    )


class Progress:
    """Told of each block that is finished."""

    def __init__(self, total):
        """Count up to a number of blocks."""
        self.total = total

    def layer_complete(self, *, layer_idx, submodule_finalized):
        """Count a block when the last of its modules is done."""
        if submodule_finalized:
            progress("Quantizing", min(layer_idx + 1, self.total), self.total)


if __name__ == "__main__":
    main("gptqmodel", quantize)
