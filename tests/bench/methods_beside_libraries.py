"""Each method's layer error over that of the library people know: a table.

    python tests/bench/methods_beside_libraries.py MODEL_FOLDER [--sequences 32] [--length 256]

Twelve linears (q, o, up and down projection of the first, middle and last block) of one model.
Quantizers get the inputs of the first half of the calibration sequences, and are judged by the mean
squared change of the outputs on the second half, tr(ΔW H ΔWᵀ); where inputs are quantized, on the
outputs with quantized inputs. A figure is the geometric mean of ours over theirs, and the extremes.
A library that is not importable here is named and left out: run it again where it is.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from library_quantizers import (
    Layer,
    bitsandbytes,
    compressed_tensors,
    compressed_tensors_w4a8,
    gguf,
    gptqmodel_gptq,
    hqq,
    llama_cpp,
    llm_int8,
    llmcompressor_gptq,
    llmcompressor_mse,
    llmcompressor_smoothquant,
)
from safetensors.torch import load_file, save_file

from advisor.calibration.statistics import LayerStatistics, scale_inputs
from advisor.evaluation.runtime import activation_simulation
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.methods.smoothquant import smoothing_scales
from advisor.models.checkpoint import read_tensor
from advisor.models.load import load_model
from advisor.schemes import parse_scheme
from advisor.workflows.texts import draw

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = QuantizationSettings()
CLIPPED = QuantizationSettings(clip="mse")
DESCENT = QuantizationSettings(descent=3)
DAMPED = QuantizationSettings(descent=3, damping=0.05)


def _int(bits, group=None, symmetric=True):
    strategy = "channel" if group is None else "group"
    return {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group}


def _fp8(strategy, block=None):
    return {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy,
        "block_structure": block,
    }  # fmt: skip


def _micro(bits, width, scale_dtype, strategy="group", **more):
    return {
        "num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy,
        "group_size": width, "scale_dtype": scale_dtype, "zp_dtype": scale_dtype, **more,
    }  # fmt: skip


def _token(kind):
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}


_STATIC = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
_FP8_GROUP = _fp8("group") | {"group_size": 128, "dynamic": True}
_MX4, _MX8 = _micro(4, 32, torch.uint8), _micro(8, 32, torch.uint8)
_NV4 = _micro(4, 16, torch.float8_e4m3fn, "tensor_group")
_LIVE, _LOCAL = {"dynamic": True}, {"dynamic": "local"}


def _ct(weights, inputs=None):
    return partial(compressed_tensors, weights=weights, inputs=inputs)


ROWS = (
    ("rtn-int4-g64-sym", PLAIN, "compressed-tensors", _ct(_int(4, 64))),
    ("rtn-int4-g64-asym", PLAIN, "compressed-tensors", _ct(_int(4, 64, symmetric=False))),
    ("rtn-int8-gch-sym", PLAIN, "compressed-tensors", _ct(_int(8))),
    ("rtn-int4-g64-sym", CLIPPED, "llmcompressor, mse",
     partial(llmcompressor_mse, weights=_int(4, 64))),
    ("gptq-int4-g64-sym", PLAIN, "llmcompressor", partial(llmcompressor_gptq, weights=_int(4, 64))),
    ("gptq-int4-g64-sym", DESCENT, "llmcompressor",
     partial(llmcompressor_gptq, weights=_int(4, 64))),
    ("gptq-int4-g64-asym", DESCENT, "llmcompressor",
     partial(llmcompressor_gptq, weights=_int(4, 64, symmetric=False))),
    ("gptq-int4-g64-sym", PLAIN, "gptqmodel",
     partial(gptqmodel_gptq, bits=4, group_size=64, desc_act=False, act_group_aware=False)),
    ("gptq-int4-g64-sym-actorder", PLAIN, "gptqmodel",
     partial(gptqmodel_gptq, bits=4, group_size=64, desc_act=True, act_group_aware=False)),
    ("gptq-int4-g64-sym", DESCENT, "gptqmodel",
     partial(gptqmodel_gptq, bits=4, group_size=64, desc_act=False, act_group_aware=False)),
    ("gptq-int4-g64-sym", DAMPED, "gptqmodel",
     partial(gptqmodel_gptq, bits=4, group_size=64, desc_act=False, act_group_aware=False)),
    ("rtn-int8-gch-sym-aint8", PLAIN, "compressed-tensors", _ct(_int(8), _token("int"))),
    ("smoothquant-int8-gch-sym-aint8", PLAIN, "llmcompressor",
     partial(llmcompressor_smoothquant, strength=0.5)),
    ("rtn-int4-g64-sym-aint8", PLAIN, "compressed-tensors", _ct(_int(4, 64), _token("int"))),
    *((f"{method}-int4-g64-sym-afp8", PLAIN, "compressed-tensors",
       partial(compressed_tensors_w4a8, group=64)) for method in ("rtn", "gptq")),
    ("rtn-fp8-gch", PLAIN, "compressed-tensors", _ct(_fp8("channel"))),
    ("rtn-fp8-gtensor", PLAIN, "compressed-tensors", _ct(_fp8("tensor"))),
    ("rtn-fp8-b128", PLAIN, "compressed-tensors", _ct(_fp8("block", [128, 128]))),
    ("rtn-fp8-gch-afp8", PLAIN, "compressed-tensors", _ct(_fp8("channel"), _token("float"))),
    ("rtn-fp8-gtensor-afp8-static", PLAIN, "compressed-tensors", _ct(_fp8("tensor"), _STATIC)),
    ("gptq-fp8-gch", PLAIN, "compressed-tensors", _ct(_fp8("channel"))),
    ("mxfp4", PLAIN, "compressed-tensors", _ct(_MX4)),
    ("mxfp4", CLIPPED, "compressed-tensors", _ct(_MX4)),
    ("mxfp4-amxfp4", PLAIN, "compressed-tensors", _ct(_MX4, _MX4 | _LIVE)),
    ("mxfp8", PLAIN, "compressed-tensors", _ct(_MX8)),
    ("mxfp8-amxfp8", PLAIN, "compressed-tensors", _ct(_MX8, _MX8 | _LIVE)),
    ("nvfp4", PLAIN, "compressed-tensors", _ct(_NV4)),
    ("nvfp4", CLIPPED, "compressed-tensors", _ct(_NV4)),
    ("nvfp4-anvfp4", PLAIN, "compressed-tensors", _ct(_NV4, _NV4 | _LOCAL)),
    *((f"hqq-int{bits}-g64-asym", PLAIN, "hqq", partial(hqq, bits=bits, group=64))
      for bits in (2, 3, 4, 8)),
    *((f"hqq-int{bits}-g64-asym", DAMPED, "hqq", partial(hqq, bits=bits, group=64))
      for bits in (2, 4)),
    *((f"bnb-{kind}{'-dq' if double else ''}", PLAIN, "bitsandbytes",
       partial(bitsandbytes, kind=kind, double=double))
      for kind in ("nf4", "fp4") for double in (False, True)),
    ("llm.int8", PLAIN, "bitsandbytes", llm_int8),
    *((f"gguf-{kind}", PLAIN, "gguf", partial(gguf, kind=kind))
      for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")),
    *((f"gguf-{kind}", PLAIN, "llama.cpp, imatrix", partial(llama_cpp, kind=kind))
      for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl",
                   "q2_k", "q3_k", "q4_k", "q5_k", "q6_k")),
)  # fmt: skip


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--inputs", type=Path, help="file that keeps the inputs for further runs")
    parser.add_argument("--library", help="only rows beside this library")
    given = parser.parse_args()
    layers = _layers(given.model, given.sequences, given.length, given.inputs)
    print("| ours | settings | library | ours / theirs | least | most |", flush=True)
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for scheme, settings, library, theirs in ROWS:
        if given.library is None or library.startswith(given.library):
            _row(layers, scheme, settings, library, theirs)


def _row(layers, scheme, settings, library, theirs) -> None:
    ratios = []
    try:
        for layer in layers:
            if layer.weight.shape[1] % 256 and scheme.endswith("_k"):
                continue  # k-quants' blocks do not fit these rows
            weight, simulate = theirs(layer)
            ratios.append(_ours(layer, scheme, settings) / _error(layer, weight, simulate))
    except ImportError as error:
        print(f"| {scheme} | | {library} | not installed ({error.name or error}) | | |", flush=True)
        return
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    cells = [scheme, _settings(settings), library, f"{mean:.4f}", f"{min(ratios):.4f}",
             f"{max(ratios):.4f}"]  # fmt: skip
    print("|", " | ".join(cells), "|", flush=True)


def _ours(layer: Layer, name: str, settings: QuantizationSettings) -> float:
    """Return the error of our quantizer, smoothing folded in where the method smooths."""
    scheme, weight, statistics = parse_scheme(name), layer.weight, layer.statistics
    scales = None
    if scheme.method == "smoothquant":
        scales = smoothing_scales([weight], statistics, settings)
        weight, statistics = weight * scales, scale_inputs(statistics, scales)
    found = quantize(weight, statistics, scheme, settings)
    simulation = activation_simulation(found.scheme, found.extras)
    if scheme.method == "llm.int8":
        simulation = None  # weights alone: the library's product is compared elsewhere
    if scales is not None:
        return _error(layer, found.dequantize(), lambda inputs: simulation(inputs / scales))
    return _error(layer, found.dequantize(), simulation)


def _settings(settings: QuantizationSettings) -> str:
    named = {CLIPPED: "clip mse", DESCENT: "descent 3", DAMPED: "descent 3, damping 0.05"}
    return named.get(settings, "")


def _error(layer: Layer, weight, simulate) -> float:
    """Mean squared change of the outputs on the judged inputs."""
    inputs = layer.judged if simulate is None else simulate(layer.judged)
    change = inputs @ weight.float().T - layer.judged @ layer.weight.T
    return float(change.double().square().sum()) / len(change)


def _layers(folder: Path, sequences: int, length: int, kept: Path | None) -> list[Layer]:
    """Return the twelve linears and their inputs."""
    if kept is not None and kept.is_file():
        seen = load_file(kept)
    else:
        seen = _inputs(folder, sequences, length)
        if kept is not None:
            save_file(seen, kept)
    layers = []
    for name, inputs in seen.items():
        first, second = inputs.split(len(inputs) // 2)
        statistics = LayerStatistics(
            len(first), first.T @ first, first.abs().amax(0), first.abs().sum(0)
        )
        weight = read_tensor(folder, f"{name}.weight").float()
        layers.append(Layer(name, weight, statistics, first, second))
    return layers


def _inputs(folder: Path, sequences: int, length: int) -> dict[str, torch.Tensor]:
    """Return the inputs of the twelve linears, [tokens, in]."""
    loaded = load_model(folder)
    tokens = draw(
        ("builtin:calibration",), loaded.tokenizer, role="calibration", sequences=sequences,
        sequence_length=length, seed=0,
    ).tokens  # fmt: skip
    blocks = loaded.model.config.num_hidden_layers
    names = [
        f"model.layers.{block}.{kind}" for block in (0, blocks // 2, blocks - 1) for kind in KINDS
    ]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for name in names:
        loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].flatten(0, 1).float())
        )
    with torch.no_grad():
        for batch in torch.as_tensor(tokens).split(4):
            loaded.model.model(batch)  # without the head
    return {name: torch.cat(parts).contiguous() for name, parts in seen.items()}


if __name__ == "__main__":
    main()
