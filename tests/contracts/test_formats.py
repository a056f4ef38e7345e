"""Every format x method x bits x group: what is written is what is read back, to the bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from advisor.calibration.statistics import LayerStatistics
from advisor.errors import InputError
from advisor.formats.export import write_checkpoint
from advisor.formats.read import read_checkpoint
from advisor.formats.registry import format_names, get_format, storage_scheme
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.quantized_weight import split_rows
from advisor.predict.storage import module_parts
from advisor.schemes import parse_scheme

_PATH = Path(__file__).parents[1] / "oracles" / "checkpoint_readers.py"
_SPEC = importlib.util.spec_from_file_location("checkpoint_readers", _PATH)
readers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(readers)

SHAPES = {
    "model.layers.0.self_attn.q_proj": (32, 96),
    "model.layers.0.self_attn.k_proj": (32, 96),
    "model.layers.0.mlp.down_proj": (96, 160),
}
"""Rectangular, with at least three groups of 32."""

_INTEGER = [
    f"{method}-int{bits}-{size}-{symmetry}"
    for method in ("rtn", "gptq")
    for bits in range(2, 9)
    for size in ("g32", "gch")
    for symmetry in ("sym", "asym")
]
_OTHERS = [
    "gptq-int4-g32-sym-actorder", "gptq-int3-g32-asym-actorder", "awq-int4-g32-asym",
    "awq-int4-g32-sym", "rtn-int8-gch-sym-aint8", "smoothquant-int8-gch-sym-aint8",
    "rtn-int4-g32-sym-aint8", "rtn-fp8-gch", "rtn-fp8-gch-afp8", "rtn-fp8-gtensor-afp8",
    "rtn-fp8-b32", "gptq-fp8-gch-afp8", "rtn-fp8-b32-afp8", "mxfp4",
    "mxfp4-amxfp4", "mxfp8", "mxfp8-amxfp8", "nvfp4",
    "rtn-fp8-gch-afp8-static", "rtn-fp8-gtensor-afp8-static", "gptq-fp8-gch-afp8-static",
    "rtn-int8-gch-sym-aint8-static", "smoothquant-int8-gch-sym-aint8-static",
    "rtn-int4-g32-sym-afp8", "gptq-int4-g32-sym-afp8",
    "nvfp4-anvfp4", "hqq-int2-g32-asym", "hqq-int3-g32-asym", "hqq-int4-g16-asym",
    "hqq-int8-g32-asym", "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq",
    "bnb-nf4-g32", "bnb-nf4-g32-dq", "bnb-fp4-g32-dq", "llm.int8",
]  # fmt: skip


def _statistics(in_features: int) -> LayerStatistics:
    inputs = torch.randn(256, in_features, generator=torch.Generator().manual_seed(in_features))
    inputs *= torch.linspace(0.2, 3.0, in_features)
    return LayerStatistics(256, inputs.t() @ inputs, inputs.abs().amax(0), inputs.abs().sum(0))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a bf16 'model' of three linears, an embedding, a norm and a bias."""
    folder = tmp_path_factory.mktemp("formats") / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in SHAPES.items()
    }
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.ones(96, dtype=torch.bfloat16)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(96, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"] = torch.ones(10, 96, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _quantize_all(source: Path, scheme: str, scale_dtype: str = "bfloat16"):
    settings = QuantizationSettings(scale_dtype=scale_dtype)
    tensors = readers.read_tensors(source / "model.safetensors")
    weights = {}
    for name in SHAPES:
        weight = torch.from_numpy(tensors[f"{name}.weight"].copy())
        statistics = _statistics(weight.shape[1])
        weights[name] = quantize(weight, statistics, parse_scheme(scheme), settings)
    return weights


def _formats_of(weights) -> list[str]:
    return [name for name in format_names() if not get_format(name).problems(weights)]


def _check_predicted_size(checkpoint, module, weight):
    """What prediction says is stored is what is stored; a text's length may be a few bytes off."""
    parts = module_parts(weight.scheme, checkpoint.format, weight.shape[1], weight.shape[0])
    predicted = {part.suffix[1:]: part.shape for part in parts}
    headers = checkpoint.stored.headers
    names = [name for name in headers if name.startswith(f"{module}.") and "bias" not in name]
    written = {name[len(module) + 1 :]: headers[name].shape for name in names}
    texts = [name for name in written if "quant_state" in name]
    for name in texts:
        assert abs(written.pop(name)[0] - predicted.pop(name)[0]) <= 8
    assert written == predicted


@pytest.mark.parametrize("scheme", _INTEGER + _OTHERS)
def test_what_is_written_is_read_back_by_us_and_by_an_independent_reader(source, tmp_path, scheme):
    weights = _quantize_all(source, scheme)
    formats = _formats_of(weights)
    assert formats, f"no format holds {scheme}"
    for name in formats:
        folder = tmp_path / name
        write_checkpoint(source, folder, format=name, weights=weights)
        checkpoint = read_checkpoint(folder)
        assert checkpoint.format == name
        assert set(checkpoint.modules) == set(SHAPES)
        tensors = readers.read_tensors(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        for module, weight in weights.items():
            expected = weight.dequantize()
            _check_predicted_size(checkpoint, module, weight)
            assert checkpoint.modules[module] == storage_scheme(weight.scheme, name)
            assert torch.equal(checkpoint.weight(module).dequantize(), expected)
            independent = readers.READERS[name](tensors, module, config)
            assert np.array_equal(independent, expected.numpy()), (name, module)
        others = {key for key, _ in checkpoint.other_tensors()}
        assert others == {
            "model.layers.0.mlp.down_proj.bias",
            "model.layers.0.input_layernorm.weight",
            "model.embed_tokens.weight",
        }


@pytest.mark.parametrize(
    ("scheme", "formats"),
    [
        ("rtn-int4-g32-sym", ["gptq", "awq", "compressed-tensors"]),
        ("rtn-int3-g32-asym", ["gptq", "compressed-tensors"]),
        ("rtn-int5-g32-sym", ["compressed-tensors"]),
        ("gptq-int4-g32-sym-actorder", ["gptq"]),
        ("rtn-int8-gch-sym-aint8", ["compressed-tensors"]),
        ("rtn-fp8-gch-afp8", ["compressed-tensors"]),
        ("rtn-int4-g32-sym-aint8", ["compressed-tensors"]),
        ("rtn-int4-g32-sym-afp8", ["compressed-tensors"]),
        ("rtn-fp8-gch-afp8-static", ["compressed-tensors"]),
        ("mxfp4-amxfp4", ["compressed-tensors"]),
        ("nvfp4-anvfp4", ["compressed-tensors"]),
        ("hqq-int4-g32-asym", ["hqq"]),
        ("bnb-nf4", ["bitsandbytes"]),
        ("llm.int8", ["bitsandbytes"]),
    ],
)
def test_each_scheme_is_held_by_the_formats_whose_loaders_know_it(source, scheme, formats):
    assert _formats_of(_quantize_all(source, scheme)) == formats


@pytest.mark.parametrize("scale_dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_scales_keep_their_values_whatever_their_data_type(source, tmp_path, name, scale_dtype):
    weights = _quantize_all(source, "rtn-int4-g32-asym", scale_dtype)
    write_checkpoint(source, tmp_path / "out", format=name, weights=weights)
    checkpoint = read_checkpoint(tmp_path / "out")
    for module, weight in weights.items():
        assert torch.equal(checkpoint.weight(module).scales, weight.scales)
    suffix = "weight_scale" if name == "compressed-tensors" else "scales"
    stored = {
        header.dtype
        for key, header in checkpoint.stored.headers.items()
        if key.endswith(f".{suffix}")
    }
    assert stored == {{"float16": "F16", "float32": "F32", "bfloat16": "BF16"}[scale_dtype]}


def test_a_format_refuses_what_it_cannot_hold_and_names_the_rule(source, tmp_path):
    weights = _quantize_all(source, "rtn-int5-g32-sym")
    with pytest.raises(InputError, match=r"2, 3, 4 or 8 bits, not rtn-int5-g32-sym.*3 modules"):
        write_checkpoint(source, tmp_path / "out", format="gptq", weights=weights)
    assert not (tmp_path / "out").exists()


def test_fused_linears_share_nvfp4s_global_scales(source, tmp_path):
    settings = QuantizationSettings()
    tensors = readers.read_tensors(source / "model.safetensors")
    names = list(SHAPES)[:2]
    originals = [torch.from_numpy(tensors[f"{name}.weight"].copy()) for name in names]
    scheme = parse_scheme("nvfp4-anvfp4")
    stacked = quantize(torch.cat(originals), _statistics(96), scheme, settings)
    weights = dict(zip(names, split_rows(stacked, [32, 32]), strict=True))
    write_checkpoint(source, tmp_path / "out", format="compressed-tensors", weights=weights)
    written = readers.read_tensors(tmp_path / "out" / "model.safetensors")
    for suffix in ("weight_global_scale", "input_global_scale"):
        assert written[f"{names[0]}.{suffix}"] == written[f"{names[1]}.{suffix}"]
