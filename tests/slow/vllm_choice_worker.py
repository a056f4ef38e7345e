"""Run inside an environment that has vLLM: how it would multiply each module of a checkpoint.

Arguments: the checkpoint's folder, a JSON file with ``prompts``, where each is a compute capability
and the modules to ask for, and the JSON file to write: of each prompt, module to the scheme that
vLLM's own loader chooses on a GPU of that capability, with its arguments. No kernel is needed:
schemes are told apart before any is looked for.
"""

import inspect
import json
import os
import sys

os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def stand_in(scheme):
    """Return the scheme without its kernel: it remembers what it was made with."""

    def __init__(self, *places, **names):
        bound = inspect.signature(scheme.__init__).bind(self, *places, **names)
        given = {key: value for key, value in bound.arguments.items() if isinstance(value, int)}
        self.words = scheme.__name__ + "".join(f" {k}={given[k]}" for k in sorted(given))

    return type(scheme.__name__, (scheme,), {"__init__": __init__})


def main(folder, questions, answers):
    """Ask and write the answers."""
    import torch
    import vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors as loader
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    with open(questions, encoding="utf-8") as handle:
        prompts = json.load(handle)["prompts"]
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as handle:
        config = json.load(handle)["quantization_config"]
    scheme = loader.CompressedTensorsScheme
    for name, value in list(vars(loader).items()):
        if inspect.isclass(value) and issubclass(value, scheme) and value is not scheme:
            setattr(loader, name, stand_in(value))
    result = []
    for (major, minor), modules in prompts:
        capability = DeviceCapability(major, minor)
        platform = type(current_platform)
        platform.get_device_capability = classmethod(lambda *_, found=capability, **__: found)
        platform.is_cuda = lambda _: True
        known = loader.CompressedTensorsConfig.from_config(config)
        known.packed_modules_mapping = FUSED
        layer = torch.nn.Linear(256, 256)
        chosen = {name: known.get_scheme(layer=layer, layer_name=name) for name in modules}
        result.append({name: found and found.words for name, found in chosen.items()})
    with open(answers, "w", encoding="utf-8") as handle:
        json.dump(result, handle)


if __name__ == "__main__":
    main(*sys.argv[1:4])
