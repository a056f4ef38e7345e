"""llm-compressor: GPTQ, AWQ, rounding, SmoothQuant and FP8, saved as compressed-tensors."""

from worker_protocol import BadJob, device_of, load_tokens, main, progress


def quantize(job):
    """Apply the recipe of a scheme and save the model as llm-compressor does."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    device = device_of(job)
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    progress("Loading", 0, 1)
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto").eval()
    if device == "cuda":
        model = model.to("cuda")
    progress("Loading", 1, 1)
    recipe, needs_text = recipe_of(job)
    arguments = {}
    if needs_text:
        tokens = load_tokens(job)
        arguments = {
            "dataset": loader_of(tokens),
            "num_calibration_samples": len(tokens),
            "max_seq_length": len(tokens[0]),
            "shuffle_calibration_samples": False,
            "pipeline": "sequential",
        }
        count_blocks(model)
    if device == "cpu":
        allow_cpu()
    oneshot(model=model, recipe=recipe, **arguments)
    progress("Saving", 0, 1)
    model.save_pretrained(job["output"], save_compressed=True)
    progress("Saving", 1, 1)
    return ()


def recipe_of(job):
    """Return the modifiers of a scheme, and whether they look at text."""
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier

    scheme, settings = job["scheme"], job["settings"]
    group = {"targets": ["Linear"], "weights": weight_arguments(scheme)}
    if scheme["activation"] is not None:
        group["input_activations"] = {
            "num_bits": 8,
            "type": "int" if scheme["activation"] == "int8" else "float",
            "strategy": "token",
            "symmetric": True,
            "dynamic": True,
        }
    common = {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    method = scheme["method"]
    gptq = {"dampening_frac": settings["dampening_frac"], "block_size": settings["block_size"]}
    actorder = None if settings["actorder"] == "none" else settings["actorder"]
    if method == "rtn":
        return [QuantizationModifier(**common)], False
    if method == "gptq":
        return [GPTQModifier(**common, **gptq, actorder=actorder)], True
    if method == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        duo = {"true": True, "false": False}.get(settings["duo_scaling"], settings["duo_scaling"])
        transform = AWQModifier(n_grid=settings["n_grid"], duo_scaling=duo)
        return [transform, QuantizationModifier(**common)], True
    if method == "smoothquant":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        smooth = SmoothQuantModifier(smoothing_strength=settings["smoothing_strength"])
        return [smooth, GPTQModifier(**common, **gptq, actorder=actorder)], True
    raise BadJob(f"this worker has no recipe for method {method!r}.")


def weight_arguments(scheme):
    """Return the arguments of the weights' grid."""
    strategy = {"group": "group", "channel": "channel", "tensor": "tensor"}[scheme["granularity"]]
    found = {
        "num_bits": scheme["bits"],
        "type": "float" if scheme["weight"] == "fp8" else "int",
        "strategy": strategy,
        "symmetric": scheme["symmetric"] is not False,
        "dynamic": False,
    }
    if strategy == "group":
        found["group_size"] = scheme["group_size"]
    return found


def loader_of(tokens):
    """Return a loader that gives exactly these sequences, one at a time."""
    import torch
    from torch.utils.data import DataLoader

    rows = [
        {
            "input_ids": torch.tensor([ids]),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        }
        for ids in tokens
    ]
    return DataLoader(rows, batch_size=None, shuffle=False)


def count_blocks(model):
    """Tell of each block that the sequential pipeline has finished."""
    from llmcompressor.core import LifecycleCallbacks

    total = model.config.num_hidden_layers + 1
    done = [0]
    original = LifecycleCallbacks.sequential_epoch_end

    def counted(*arguments, **named):
        result = original(*arguments, **named)
        done[0] += 1
        progress("Quantizing", min(done[0], total), total)
        return result

    LifecycleCallbacks.sequential_epoch_end = counted


def allow_cpu():
    """Keep AWQ from pinning memory, which needs an accelerator."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, *arguments, **named: None


if __name__ == "__main__":
    main("llmcompressor", quantize)
