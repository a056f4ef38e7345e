"""bitsandbytes through transformers: NF4, FP4 and LLM.int8(), saved as transformers saves them."""

from worker_protocol import BadJob, device_of, main, model_dtype, progress


def quantize(job):
    """Load the model quantized and save it at once.

    Nothing is run before: on a CPU, a forward repacks 4-bit weights in place, and what is saved
    after it is damaged.
    """
    import torch

    torch.set_num_threads(job["threads"])
    device = device_of(job)
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, model_dtype(job["model"]))
    progress("Quantizing", 0, 1)
    model = AutoModelForCausalLM.from_pretrained(
        job["model"],
        dtype=dtype,
        device_map={"": device},
        quantization_config=configuration_of(job, dtype),
    )
    progress("Quantizing", 1, 1)
    progress("Saving", 0, 1)
    model.save_pretrained(job["output"])
    progress("Saving", 1, 1)
    return ()


def configuration_of(job, dtype):
    """Return transformers' configuration of the scheme."""
    from transformers import BitsAndBytesConfig

    scheme = job["scheme"]
    if scheme["method"] == "llm.int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=float(job["settings"]["int8_threshold"])
        )
    if scheme["method"] != "bnb":
        raise BadJob(f"this worker makes bnb and llm.int8, not {scheme['method']!r}.")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=scheme["weight"],
        bnb_4bit_use_double_quant=scheme["double_quantization"],
        bnb_4bit_compute_dtype=dtype,
    )


if __name__ == "__main__":
    main("bitsandbytes", quantize)
