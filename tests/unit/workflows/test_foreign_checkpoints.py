"""FP8 and NVFP4 checkpoints of other tools, written here from the formats' descriptions."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor import workflows
from advisor.errors import InputError, VerificationError
from advisor.formats.base import Stored, TensorHeader
from advisor.formats.read import read_checkpoint
from advisor.formats.registry import get_format

UP, OUT = "model.layers.1.mlp.up_proj", "model.layers.0.self_attn.o_proj"
OPTIONS = {"evaluation_sequences": 4, "sequence_length": 32}


def e4m3(byte):
    """Return what an E4M3 byte stands for: four bits of exponent with bias 7, three of mantissa."""
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = mantissa / 8 * 2.0**-6 if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if byte >> 7 else value


E4M3 = [e4m3(byte) for byte in range(256)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def to_fp8(values):
    """Nearest E4M3 numbers of values, as float64 and as stored."""
    stored = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    table = np.array(E4M3)
    return torch.from_numpy(table[stored.view(torch.uint8).numpy()]), stored


def to_fp4(values):
    """Nearest E2M1 numbers and their codes: sign in the highest of four bits."""
    table = torch.tensor(E2M1, dtype=torch.float64)
    codes = (values.abs().double()[..., None] - table).abs().argmin(-1)
    read = torch.copysign(table[codes], values.double())
    return read, (codes + 8 * (values < 0)).to(torch.uint8)


def fp8_block(weight, side=128):
    """DeepSeek's: a scale for each block of 128 x 128, at the edges what is left of one."""
    scales = torch.empty(-(-weight.shape[0] // side), -(-weight.shape[1] // side))
    read, stored = torch.empty_like(weight, dtype=torch.float64), []
    for row in range(scales.shape[0]):
        strip = []
        for column in range(scales.shape[1]):
            rows, columns = (
                slice(row * side, (row + 1) * side),
                slice(column * side, (column + 1) * side),
            )
            scales[row, column] = weight[rows, columns].abs().max() / 448
            values, codes = to_fp8(weight[rows, columns] / scales[row, column])
            read[rows, columns] = values * scales[row, column].double()
            strip.append(codes.view(torch.uint8))
        stored.append(torch.cat(strip, 1))
    codes = torch.cat(stored).view(torch.float8_e4m3fn)
    return read, {"weight": codes, "weight_scale_inv": scales}


def fp8_tensor(weight, shape=()):
    scale = weight.abs().max() / 448
    values, codes = to_fp8(weight / scale)
    return values * scale.double(), {"weight": codes, "weight_scale": scale.reshape(shape)}


def fp8_static(weight):
    read, tensors = fp8_tensor(weight, (1,))
    return read, tensors | {"input_scale": torch.tensor(0.02)}


def fp8_channel(weight):
    scales = weight.abs().amax(1) / 448
    values, codes = to_fp8(weight / scales[:, None])
    return values * scales[:, None].double(), {"weight": codes, "weight_scale": scales}


def fp8_pb_wo(weight):
    read, tensors = fp8_block(weight)
    scales = tensors.pop("weight_scale_inv")
    return read, tensors | {"weight_scale": scales[:, None, :, None].contiguous()}


def nvfp4(weight, inputs=True):
    overall = weight.abs().max() / (448 * 6)
    groups = weight.view(len(weight), -1, 16)
    local, stored = to_fp8(groups.abs().amax(-1) / 6 / overall)
    values, codes = to_fp4(groups / (local.float() * overall)[..., None])
    pairs = codes.view(len(weight), -1, 2)
    tensors = {
        "weight": pairs[..., 0] + 16 * pairs[..., 1], "weight_scale": stored,
        "weight_scale_2": overall.reshape(()),
    }  # fmt: skip
    if inputs:
        tensors["input_scale"] = torch.tensor(3.5 / (448 * 6))
    read = values * (local * overall.double())[..., None]
    return read.view_as(weight), tensors


def mxfp8(weight):
    groups = weight.view(len(weight), -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 8
    values, codes = to_fp8(groups / 2.0 ** exponents[..., None])
    read = values * 2.0 ** exponents[..., None].double()
    return read.view_as(weight), {
        "weight": codes.view_as(weight), "weight_scale": (exponents + 127).to(torch.uint8),
    }  # fmt: skip


KINDS = {
    "fp8-block": ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                   "weight_block_size": [128, 128]}, fp8_block, "rtn-fp8-b128-afp8"),
    "fp8-tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, fp8_tensor,
                   "rtn-fp8-gtensor-afp8"),
    "fp8-static": ({"quant_method": "fp8", "activation_scheme": "static",
                    "ignored_layers": ["lm_head"]}, fp8_static, "rtn-fp8-gtensor-afp8-static"),
    "modelopt-fp8": ({"producer": {"name": "modelopt"}, "quantization": {
        "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}},
        fp8_static, "rtn-fp8-gtensor-afp8-static"),
    "modelopt-channel": ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
                          "ignore": ["lm_head"]}, fp8_channel, "rtn-fp8-gch-afp8"),
    "modelopt-block": ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo", "ignore": []},
                       fp8_pb_wo, "rtn-fp8-b128-afp8"),
    "modelopt-nvfp4": ({"producer": {"name": "modelopt"}, "quantization": {
        "quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.router*"]}},
        nvfp4, "nvfp4-anvfp4"),
    "modelopt-w4a16": ({"quant_method": "modelopt_fp4", "quant_algo": "W4A16_NVFP4",
                        "ignore": ["lm_head"]}, lambda w: nvfp4(w, inputs=False), "nvfp4"),
    "modelopt-mxfp8": ({"quant_method": "modelopt", "quant_algo": "MXFP8", "ignore": ["lm_head"]},
                       mxfp8, "mxfp8-amxfp8"),
}  # fmt: skip


@pytest.fixture
def written(original, tmp_path):
    """Write a checkpoint: its folder, and what each module's weight stands for, float64."""

    def build(kind, *, kept=(), change=None):
        config, make, _ = KINDS[kind]
        folder = tmp_path / kind
        shutil.copytree(original, folder)
        tensors, read = {}, {}
        for name, tensor in load_file(original / "model.safetensors").items():
            module = name.removesuffix(".weight")
            if not module.endswith("_proj") or module in kept:
                tensors[name] = tensor
                continue
            read[module], parts = make(tensor.float())
            tensors |= {f"{module}.{key}": part.contiguous() for key, part in parts.items()}
        if change is not None:
            change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads(json.dumps(config))
        if "quantization" in settings:  # in a file of its own
            settings["quantization"]["exclude_modules"] += list(kept)
            (folder / "hf_quant_config.json").write_text(json.dumps(settings))
            return folder, read
        listed = "modules_to_not_convert" if config["quant_method"] == "fp8" else "ignore"
        settings[listed] = [*settings.get(listed, ()), *kept]
        document = json.loads((folder / "config.json").read_text())
        document["quantization_config"] = settings
        (folder / "config.json").write_text(json.dumps(document))
        return folder, read

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_holds_is_read_to_the_last_bit(written, kind):
    folder, read = written(kind, kept=(OUT,))
    found = workflows.inspect(folder, gpu="h100-sxm", engine="vllm")
    assert found.faults == ()
    assert found.refusals == ()
    assert found.format == kind.partition("-")[0]
    assert found.modules.pop(OUT) == "bf16"
    assert set(found.modules.values()) == {KINDS[kind][2]}
    assert len(found.modules) == len(read) == 13
    row = next(row for row in found.schemes if row.name == KINDS[kind][2])
    small = "block" in kind  # a module of 64 inputs fits no kernel for blocks of 128
    words = "none: shapes: cutlass-fp8-block" if small else ("native", "weight-only")
    assert row.kernel.startswith(words)
    bits = {"nvfp4": 4.5, "w4a16": 4.5, "mxfp8": 8.25}.get(kind.partition("-")[2], 8)
    # One module of 14 has 16 bits, and the scales of such small blocks weigh something.
    assert bits < found.bits_per_weight < bits + 1.2
    assert found.size_bytes == (folder / "model.safetensors").stat().st_size
    checkpoint = read_checkpoint(folder)
    for name, expected in read.items():
        weight = checkpoint.weight(name)
        torch.testing.assert_close(weight.dequantize().double(), expected, rtol=3e-7, atol=1e-30)
        assert weight.shape == tuple(expected.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_compare_computes_as_it_will_be_served(written, original, kind):
    folder, _ = written(kind)
    found = workflows.compare(original, folder, **OPTIONS)
    assert found.kl.value > 1e-6
    assert {row["scheme"] for row in found.modules} == {KINDS[kind][2]}
    largest = 0.2 if "nvfp4" in KINDS[kind][2] else 0.04
    assert 0.01 < found.modules[0]["relative_error"] < largest
    same = workflows.compare(folder, folder, **OPTIONS)
    assert abs(same.kl.value) < 1e-5


@pytest.mark.parametrize(
    ("make", "kind"), [(fp8_block, "fp8-block"), (fp8_pb_wo, "modelopt-block")]
)
def test_blocks_at_the_edges_may_be_smaller(make, kind):
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(5))
    weight[:128, 128:] *= 50
    expected, tensors = make(weight)
    tensors = {f"m.{name}": tensor for name, tensor in tensors.items()}
    kinds = {torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
    headers = {
        name: TensorHeader(tuple(tensor.shape), kinds[tensor.dtype])
        for name, tensor in tensors.items()
    }
    stored, config = Stored(headers, tensors.__getitem__), KINDS[kind][0]
    form = get_format(kind.partition("-")[0])
    found = form.find_modules(config, stored)
    assert found.problems == ()
    weight = form.unpack("m", found.modules["m"], config, stored)
    assert weight.scales.shape == (3, 2)
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=3e-7, atol=1e-30)


def test_inputs_are_rounded_with_the_scale_of_the_file(written):
    """An input scale a hundred times too small saturates what a server computes."""

    def shrink(tensors):
        for name in [name for name in tensors if name.endswith("input_scale")]:
            tensors[name] = tensors[name] / 100

    whole, _ = written("fp8-static")
    shutil.move(whole, whole.with_name("whole"))
    cut, _ = written("fp8-static", change=shrink)
    found = workflows.compare(whole.with_name("whole"), cut, **OPTIONS)
    assert found.kl.value > 1e-3
    assert all(row["relative_error"] < 1e-6 for row in found.modules)


@pytest.mark.parametrize(
    ("kind", "suffix", "value", "words"),
    [
        ("fp8-block", "weight_scale_inv", None, f"{UP} has no weight_scale_inv"),
        ("fp8-block", "weight_scale_inv", torch.ones(3, 1),
         f"{UP}: weight_scale_inv has shape [3, 1], expected [1, 1] (config.json says rtn-fp8"),
        ("fp8-block", "weight_scale_inv", torch.full((1, 1), float("nan")),
         f"{UP}: 1 of 1 scales are not finite."),
        ("fp8-block", "weight", torch.full((128, 64), float("nan")).to(torch.float8_e4m3fn),
         f"{UP}: its weights are not finite once dequantized."),
        ("fp8-tensor", "weight_scale", torch.ones(128), f"{UP}: weight_scale has shape [128]"),
        ("fp8-static", "input_scale", None, f"{UP} has no input_scale"),
        ("fp8-static", "input_scale", torch.tensor(0.0), f"{UP}: the scale of its inputs is 0.0."),
        ("modelopt-fp8", "weight_scale", None, f"{UP} has no weight_scale"),
        ("modelopt-nvfp4", "weight_scale_2", None, f"{UP} has no weight_scale_2"),
        ("modelopt-nvfp4", "weight_scale", torch.ones(128, 2).to(torch.float8_e4m3fn),
         f"{UP}: weight_scale has shape [128, 2], expected [128, 4] (its settings say nvfp4-a"),
        ("modelopt-nvfp4", "input_scale", torch.tensor(float("inf")),
         f"{UP}: the scale of its inputs is 0.0."),
        ("modelopt-mxfp8", "weight_scale", torch.ones(128, 2),
         f"{UP}: weight_scale is stored as F32"),
    ],
)  # fmt: skip
def test_faults_name_the_module_and_the_tensor(written, kind, suffix, value, words):
    def change(tensors):
        del tensors[f"{UP}.{suffix}"]
        if value is not None:
            tensors[f"{UP}.{suffix}"] = value

    folder, _ = written(kind, change=change)
    faults = workflows.inspect(folder, gpu="h100-sxm", engine="vllm").faults
    assert len(faults) == 1
    assert faults[0].startswith(words), faults


def test_modules_that_lists_and_tensors_say_different_things_of(written, original):
    folder, _ = written("fp8-block", kept=(OUT,))
    document = json.loads((folder / "config.json").read_text())
    settings = document["quantization_config"]
    settings["modules_to_not_convert"] = ["model.layers.1.mlp"]
    (folder / "config.json").write_text(json.dumps(document))
    faults = workflows.inspect(folder, gpu="cpu", engine="transformers").faults
    assert len(faults) == 4
    assert sum("keeps it 16-bit, but its tensors are quantized" in fault for fault in faults) == 3
    assert f"(first: {OUT}) is quantized, but the weight is 16-bit" in faults[-1]
    with pytest.raises(VerificationError, match="is faulty"):
        workflows.compare(original, folder, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_block_size": [1, 128]}, "weight_block_size [1, 128] is unknown: squares"),
        ({"activation_scheme": "static"}, "blocks of weights with static activations are unknown"),
        ({"activation_scheme": "none"}, "activation_scheme 'none' is neither dynamic nor static"),
    ],
)
def test_settings_that_no_loader_knows(written, change, words):
    folder, _ = written("fp8-block")
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(document))
    faults = workflows.inspect(folder, gpu="h100-sxm", engine="vllm").faults
    assert words in faults[0]


def test_mixed_precision_of_model_optimizer_is_resolved_layer_by_layer(written, original):
    folder, _ = written("modelopt-nvfp4", kept=(OUT,))
    tensors = load_file(folder / "model.safetensors")
    for suffix in ("weight", "weight_scale", "weight_scale_2", "input_scale"):
        del tensors[f"{UP}.{suffix}"]
    weight = load_file(original / "model.safetensors")[f"{UP}.weight"].float()
    tensors |= {f"{UP}.{key}": part for key, part in fp8_static(weight)[1].items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layers = {
        name.removesuffix(".weight_scale"): {"quant_algo": "NVFP4", "group_size": 16}
        for name in tensors if name.endswith(".weight_scale")
    }  # fmt: skip
    layers[UP] = {"quant_algo": "FP8"}
    settings = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    found = workflows.inspect(folder, gpu="b200", engine="vllm")
    assert found.faults == ()
    assert found.modules[UP] == "rtn-fp8-gtensor-afp8-static"
    assert found.modules[OUT] == "bf16"
    assert list(found.modules.values()).count("nvfp4-anvfp4") == 12
    # gate and up are one product in vLLM.
    assert any("must share a scheme" in refusal for refusal in found.refusals)
    layers[UP] = {"quant_algo": "W4A8_AWQ"}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    faults = workflows.inspect(folder, gpu="b200", engine="vllm").faults
    assert f"{UP}: quant_algo 'W4A8_AWQ' is not read here: FP8, FP8_PER" in faults[0]


@pytest.mark.parametrize(
    ("kind", "gpu", "engine", "kernel"),
    [
        ("fp8-tensor", "l4", "vllm", "native: cutlass-fp8"),
        ("fp8-tensor", "a100-sxm-80", "vllm", "weight-only: marlin-fp8"),
        ("modelopt-fp8", "a100-sxm-80", "vllm", "none: "),
        ("modelopt-nvfp4", "b200", "vllm", "native: cutlass-nvfp4"),
        ("modelopt-nvfp4", "h100-sxm", "vllm", "weight-only: marlin-nvfp4"),
        ("fp8-tensor", "h100-sxm", "sglang", "native: fp8-scaled-mm"),
    ],
)
def test_kernels_that_run_them(written, kind, gpu, engine, kernel):
    found = workflows.inspect(written(kind)[0], gpu=gpu, engine=engine)
    assert found.schemes[0].kernel.startswith(kernel)


def test_gpt_oss_experts_are_described(original, tmp_path):
    folder = tmp_path / "oss"
    shutil.copytree(original, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts.gate_up_proj"
        tensors[f"{path}_blocks"] = torch.zeros(32, 8, 2, 16, dtype=torch.uint8)
        tensors[f"{path}_scales"] = torch.zeros(32, 8, 2, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    document = json.loads((folder / "config.json").read_text())
    document["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(document))
    found = workflows.inspect(folder, gpu="cpu", engine="transformers")
    assert found.format == "unreadable"
    words = "2 tensors of MXFP4 blocks for 32 fused experts a layer, 3.28e-05 billion weights"
    assert words in found.faults[0]


def test_they_are_not_written(original, tmp_path):
    from advisor.formats.export import write_checkpoint
    from advisor.methods.registry import quantize
    from advisor.methods.settings import QuantizationSettings
    from advisor.schemes import parse_scheme

    weight = torch.randn(128, 64, generator=torch.Generator().manual_seed(0))
    weights = {
        UP: quantize(weight, None, parse_scheme("rtn-fp8-gtensor-afp8"), QuantizationSettings())
    }
    for name in ("fp8", "modelopt"):
        with pytest.raises(InputError, match=re.escape("read here, but not written (1 module")):
            write_checkpoint(original, tmp_path / name, format=name, weights=weights)
