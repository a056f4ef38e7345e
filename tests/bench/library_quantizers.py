"""What other libraries make of a linear's weight, from the same inputs: one function for each.

Every function imports its library when called, and takes a :class:`Layer`. It returns the weight
that the library's checkpoint stands for, and what it does to inputs at run time (None: nothing).
"""

from __future__ import annotations

import ctypes
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from advisor.numerics.int4_fp8 import dequantize_int4_fp8

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from advisor.calibration.statistics import LayerStatistics


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear: its weight, what quantizers are told of its inputs, and what they are judged on.

    Attributes:
        name: Path of the module.
        weight: float32 [out, in].
        statistics: Of the inputs given to quantizers.
        inputs: Those inputs, [tokens, in].
        judged: Other inputs, [tokens, in].
    """

    name: str
    weight: Tensor
    statistics: LayerStatistics
    inputs: Tensor
    judged: Tensor


def _arguments(**given):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(**given)


def _grouped(weight: Tensor, arguments) -> Tensor:
    """Return a weight with a dimension that each scale covers, as observers see it."""
    width = arguments.group_size or weight.shape[1]
    return weight.unflatten(-1, (-1, width)) if width > 0 else weight.unsqueeze(-2)


def compressed_tensors(layer: Layer, weights: dict, inputs: dict | None = None, stored=None):
    """Round with compressed-tensors' own scales and arithmetic; ``inputs`` likewise."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import helpers

    arguments = _arguments(**weights)
    weight = layer.weight
    if arguments.strategy == "tensor":
        low, high = weight.amin().reshape(1), weight.amax().reshape(1)
    elif arguments.strategy == "block":
        rows, columns = arguments.block_structure
        padded = torch.nn.functional.pad(
            weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        )
        tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    else:
        groups = _grouped(weight, arguments)
        low, high = groups.amin(-1), groups.amax(-1)
    overall = None
    if arguments.strategy == "tensor_group":
        overall = helpers.generate_gparam(weight.amin().reshape(1), weight.amax().reshape(1))
    scales, zeros = helpers.calculate_qparams(low, high, arguments, global_scale=overall)
    if arguments.scale_dtype is None:
        scales = scales.to(torch.bfloat16).float()  # as the checkpoint stores them
    rounded = fake_quantize(
        weight, scales.float() if overall is None else scales, zeros, arguments,
        global_scale=overall,
    )  # fmt: skip
    return rounded.float(), None if inputs is None else _inputs(layer, _arguments(**inputs))


def _inputs(layer: Layer, arguments) -> Callable[[Tensor], Tensor]:
    """Return how compressed-tensors rounds inputs, with calibrated scales where it has any."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import helpers

    largest = layer.inputs.abs().amax().reshape(1)
    if arguments.dynamic is False:
        scale, zero = helpers.calculate_qparams(-largest, largest, arguments)
        return lambda x: fake_quantize(x, scale.to(torch.bfloat16).float(), zero, arguments)
    overall = None
    if arguments.strategy == "tensor_group":
        overall = helpers.generate_gparam(-largest, largest)

    def simulate(x: Tensor) -> Tensor:
        if arguments.strategy == "token":
            low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        else:
            groups = _grouped(x, arguments)
            low, high = groups.amin(-1), groups.amax(-1)
        scales, zeros = helpers.calculate_qparams(low, high, arguments, global_scale=overall)
        return fake_quantize(x, scales, zeros, arguments, global_scale=overall).float()

    return simulate


def compressed_tensors_w4a8(layer: Layer, group: int):
    """Round to int4 as compressed-tensors, and compute as vLLM's kernel for FP8 inputs will."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import helpers

    arguments = _arguments(num_bits=4, symmetric=True, strategy="group", group_size=group)
    groups = _grouped(layer.weight, arguments)
    scales, zeros = helpers.calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
    scales = scales.to(torch.bfloat16).float()
    codes = quantize(layer.weight, scales, zeros, arguments).float() + 8
    token = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    return dequantize_int4_fp8(codes, scales), _inputs(layer, _arguments(**token))


def llmcompressor_mse(layer: Layer, weights: dict):
    """Round with the scales of llm-compressor's searching observer."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor.observers import Observer

    arguments = _arguments(**weights, observer="memoryless_mse")
    module = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
    module.weight.data.copy_(layer.weight)
    scales, zeros = _observed(Observer, arguments, module)
    return fake_quantize(layer.weight, scales, zeros, arguments), None


def _observed(observers, arguments, module):
    observer = observers.load_from_registry(
        arguments.observer, base_name="weight", args=arguments, module=module
    )
    observer(module.weight)
    found = observer.get_qparams()
    scales, zeros = (found["scale"], found["zero_point"]) if isinstance(found, dict) else found[:2]
    return scales.to(torch.bfloat16).float(), zeros


def llmcompressor_gptq(layer: Layer, weights: dict):
    """Run llm-compressor's GPTQ with its default observer and damping."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    arguments = _arguments(**weights, observer="memoryless_minmax")
    module = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
    module.weight.data.copy_(layer.weight)
    scales, zeros = _observed(Observer, arguments, module)
    moment = layer.statistics.second_moment / layer.statistics.tokens
    found, _, _ = quantize_weight(
        layer.weight[None].clone(), moment[None].clone(), scales[None], zeros[None], None, arguments
    )
    return found[0], None


def llmcompressor_smoothquant(layer: Layer, strength: float):
    """Smooth with llm-compressor's scales, then round weights and tokens to int8 as its W8A8."""
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    module = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
    module.weight.data.copy_(layer.weight)
    spread = layer.inputs.amax(0) - layer.inputs.amin(0)
    with torch.no_grad():
        scales = SmoothQuantModifier(smoothing_strength=strength)._calculate_smoothing_scales(
            [module], spread
        )
    smoothed = replace(layer, weight=layer.weight * scales, inputs=layer.inputs / scales)
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "symmetric": True, "strategy": "channel"}
    weight, simulate = compressed_tensors(smoothed, weights, token)
    return weight, lambda inputs: simulate(inputs / scales)


def gptqmodel_gptq(layer: Layer, **settings):
    """Run gptqmodel's GPTQ on the layer's inputs."""
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    module = torch.nn.Linear(layer.weight.shape[1], layer.weight.shape[0], bias=False)
    module.weight.data.copy_(layer.weight)
    task = GPTQ(module, QuantizeConfig(**settings))
    task.quantizer.configure(perchannel=True)
    with torch.no_grad():
        for batch in layer.inputs.split(256):
            task.add_batch(batch[None], module(batch[None]))
        found = task.quantize()
    return found[0].float(), None


def hqq(layer: Layer, bits: int, group: int):
    """Run hqq's quantizer, float32 scales and zero points."""
    from hqq.core.quantize import Quantizer

    codes, meta = Quantizer.quantize(
        layer.weight, nbits=bits, group_size=group, axis=1, device="cpu",
        compute_dtype=torch.float32,
    )  # fmt: skip
    meta["compute_dtype"] = torch.float32
    for key in ("scale", "zero"):
        meta[key] = meta[key].to(torch.bfloat16).float()  # as the checkpoint stores them
    return Quantizer.dequantize(codes, meta), None


def bitsandbytes(layer: Layer, kind: str, double: bool, block: int = 64):
    """Run bitsandbytes' 4-bit quantizer."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(
        layer.weight.clone(), blocksize=block, compress_statistics=double, quant_type=kind
    )
    return functional.dequantize_4bit(packed, state), None


def llm_int8(layer: Layer):
    """Run LLM.int8() of bitsandbytes on the weight."""
    from bitsandbytes import functional

    codes, maxima, _ = functional.int8_vectorwise_quant(layer.weight.half())
    return codes.float() * maxima.float()[:, None] / 127, None


def gguf(layer: Layer, kind: str):
    """Round as the gguf package does, which knows no importance."""
    import gguf as package

    chosen = package.GGMLQuantizationType[kind.upper()]
    rounded = package.quants.dequantize(
        package.quants.quantize(layer.weight.numpy(), chosen), chosen
    )
    return torch.from_numpy(rounded), None


def llama_cpp(layer: Layer, kind: str):
    """Quantize with llama.cpp's own code and an importance matrix; read back by gguf."""
    import gguf as package

    found = importlib.util.find_spec("libggml")
    if found is None or not found.submodule_search_locations:
        raise ImportError("libggml")
    folder = Path(next(iter(found.submodule_search_locations)))
    library = ctypes.CDLL(str(next(folder.glob("lib*/libggml-base.so"))))
    quantize = library.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    chosen = package.GGMLQuantizationType[kind.upper()]
    rows, columns = layer.weight.shape
    values = np.ascontiguousarray(layer.weight.numpy())
    importance = np.ascontiguousarray(
        (layer.statistics.second_moment.diagonal() / layer.statistics.tokens).numpy()
    )
    block, size = package.GGML_QUANT_SIZES[chosen]
    output = np.zeros((rows, columns // block * size), np.uint8)
    quantize(
        int(chosen), values.ctypes.data, output.ctypes.data, 0, rows, columns,
        importance.ctypes.data,
    )  # fmt: skip
    return torch.from_numpy(package.quants.dequantize(output, chosen)), None
