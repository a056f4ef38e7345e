"""Our checkpoints in transformers itself, with compressed-tensors and bitsandbytes, here.

What is compared: the logits of the loader's own model with those of our simulation. The largest
difference is also a property of the test, in roundings of the data type (``--junitxml``).
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.engines import mixture_options
from advisor.evaluation import runtime
from advisor.evaluation.runtime import quantized_model
from advisor.formats.export import write_checkpoint
from advisor.hardware.catalogue import find_profile
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import read_tensor, tensor_names
from advisor.schemes import parse_scheme

PROMPTS = [list(range(2, 66)), list(range(300, 236, -1))]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def mixed(module: str) -> str | None:
    """Three storages of compressed-tensors side by side, and a 16-bit module."""
    if "layers.0.self_attn" in module:
        return "rtn-int8-gch-sym"
    if "layers.0.mlp.down_proj" in module:
        return None
    return "rtn-fp8-gch" if "self_attn" in module else "rtn-int4-g32-asym"


def floats(module: str) -> str | None:
    """What vLLM's mixtures may hold under 16-bit inputs: six storages in five formats."""
    first = "layers.0." in module
    if "mlp.down_proj" in module:
        return "rtn-fp8-gch" if first else None
    if "mlp" in module:
        return "nvfp4" if first else "rtn-int4-g64-asym"
    return "mxfp4" if first else "rtn-int8-gch-sym"


def rounding(module: str) -> str | None:
    """What they may hold where inputs are rounded, beside 16 bits."""
    if "o_proj" in module or "layers.1.mlp.down_proj" in module:
        return None
    if "mlp" in module:
        return "nvfp4-anvfp4" if "layers.0." in module else "mxfp4-amxfp4"
    return "rtn-fp8-gch-afp8" if "layers.0." in module else "rtn-int8-gch-sym-aint8"


def inputs_statistics(weight):
    """Return statistics of which only the largest inputs matter: NVFP4's inputs have a scale."""
    size = weight.shape[1]
    return LayerStatistics(1, torch.eye(size), torch.full((size,), 6.0), torch.ones(size))


def quantized(folder, choose):
    weights = {}
    for name in tensor_names(folder):
        module = name.removesuffix(".weight")
        scheme = choose(module) if callable(choose) else choose
        if module.endswith("_proj") and scheme is not None:
            weight = read_tensor(folder, name).to(torch.float32)
            found = parse_scheme(scheme)
            known = inputs_statistics(weight) if found.activation == "nvfp4" else None
            weights[module] = quantize(weight, known, found, QuantizationSettings())
    return weights


def with_head(folder, weights, scheme):
    """Add a quantized head to a model's quantized linears."""
    head = read_tensor(folder, "lm_head.weight").to(torch.float32)
    return weights | {"lm_head": quantize(head, None, parse_scheme(scheme), QuantizationSettings())}


def logits_of(folder, dtype, weights=None):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    # The loader's own model as it is: bitsandbytes repacks its weights when they first run.
    simulated = nullcontext() if weights is None else quantized_model(model, weights)
    with torch.no_grad(), simulated:
        return torch.stack([model(torch.tensor([ids])).logits[0].float() for ids in PROMPTS])


def roundings(found, expected, dtype) -> float:
    """Return the largest difference over the data type's rounding of the largest logit."""
    unit = torch.finfo(dtype).eps * float(expected.abs().max())
    return float((found - expected).abs().max()) / unit


class EachInTurn:
    """All options that mixtures have on one grid, a module each in turn."""

    def __init__(self, symmetric: bool) -> None:
        offered = mixture_options("transformers", find_profile("rtx-4090")).schemes
        wanted = [scheme for scheme in offered if scheme.symmetric is symmetric]
        self.options = [str(replace(scheme, method="rtn")) for scheme in wanted]
        self.given: dict[str, str] = {}

    def __call__(self, module: str) -> str | None:
        if not module.endswith("_proj"):
            return None
        return self.given.setdefault(module, self.options[len(self.given) % len(self.options)])


@pytest.mark.parametrize(
    ("choose", "limit"),
    [
        ("rtn-int2-g32-asym", 0.0), ("rtn-int3-g32-sym", 0.0), ("rtn-int4-g32-sym", 0.0),
        ("rtn-int4-g64-asym", 0.0), ("rtn-int4-gch-sym", 0.0), ("rtn-int5-g32-asym", 0.0),
        ("rtn-int6-g32-sym", 0.0), ("rtn-int8-g32-asym", 0.0), ("rtn-int8-gch-sym", 0.0),
        ("rtn-fp8-gch", 0.0), ("rtn-fp8-gtensor", 0.0), ("rtn-fp8-b128", 0.0), (mixed, 0.0),
        (EachInTurn(symmetric=True), 0.0), (EachInTurn(symmetric=False), 0.0),
        ("mxfp4", 0.0), ("mxfp8", 0.0), ("nvfp4", 0.0), (floats, 0.0),
        # transformers rounds the scales of inputs to bf16, vLLM's kernels (and we) do not.
        ("rtn-int8-gch-sym-aint8", 32.0), ("rtn-fp8-gch-afp8", 32.0), (rounding, 64.0),
    ],
)  # fmt: skip
def test_compressed_tensors(model_folder, tmp_path, choose, limit, record_property):
    weights = quantized(model_folder, choose)
    write_checkpoint(model_folder, tmp_path / "out", format="compressed-tensors", weights=weights)
    found = logits_of(tmp_path / "out", torch.bfloat16)
    expected = logits_of(model_folder, torch.bfloat16, weights)
    difference = roundings(found, expected, torch.bfloat16)
    record_property("roundings", difference)
    assert difference <= limit
    if choose in (floats, rounding):
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        formats = {group["format"] for group in config["config_groups"].values()}
        assert config["format"] == "mixed-precision"
        assert len(formats) == 4
    if isinstance(choose, EachInTurn):
        assert set(choose.options) == set(choose.given.values())


def as_compressed_tensors_rounds(kind):
    """Inputs as the library rounds them: scales in the inputs' own data type, int8 over 127.5."""

    def simulate(inputs):
        largest = inputs.float().abs().amax(-1, keepdim=True)
        scale = (largest / (127.5 if kind == "int8" else 448.0)).to(inputs.dtype)
        if kind == "int8":
            return torch.clamp(torch.round(inputs / scale), -128, 127) * scale
        codes = torch.clamp(inputs / scale, -448, 448).to(torch.float8_e4m3fn)
        return codes.to(inputs.dtype) * scale

    return simulate


@pytest.mark.parametrize(
    ("scheme", "kind"), [("rtn-int8-gch-sym-aint8", "int8"), ("rtn-fp8-gch-afp8", "fp8")]
)
def test_the_scales_of_inputs_are_all_that_differs(
    model_folder, tmp_path, monkeypatch, scheme, kind
):
    weights = quantized(model_folder, scheme)
    write_checkpoint(model_folder, tmp_path / "out", format="compressed-tensors", weights=weights)
    found = logits_of(tmp_path / "out", torch.bfloat16)
    monkeypatch.setitem(runtime._SIMULATIONS, kind, as_compressed_tensors_rounds(kind))
    assert torch.equal(found, logits_of(model_folder, torch.bfloat16, weights))


@pytest.mark.parametrize(
    ("scheme", "limit"),
    [("bnb-nf4", 8.0), ("bnb-nf4-dq", 8.0), ("bnb-fp4", 8.0), ("bnb-fp4-dq", 8.0),
     ("llm.int8", 16.0)],
)  # fmt: skip
def test_bitsandbytes(model_folder, tmp_path, scheme, limit, record_property):
    weights = quantized(model_folder, scheme)
    write_checkpoint(model_folder, tmp_path / "out", format="bitsandbytes", weights=weights)
    found = logits_of(tmp_path / "out", torch.bfloat16)
    expected = logits_of(model_folder, torch.bfloat16, weights)
    difference = roundings(found, expected, torch.bfloat16)
    record_property("roundings", difference)
    assert difference <= limit


@pytest.mark.parametrize(
    ("name", "linears", "head", "limit"),
    [
        ("compressed-tensors", "rtn-int4-g64-asym", "rtn-int4-g64-asym", 0.0),
        ("compressed-tensors", "rtn-int4-g32-sym", "rtn-int8-gch-sym", 0.0),
        ("compressed-tensors", mixed, "rtn-int4-g32-asym", 0.0),
        ("bitsandbytes", "bnb-nf4", "bnb-nf4", 8.0),
        ("bitsandbytes", "llm.int8", "llm.int8", 16.0),
    ],
)
def test_a_quantized_head(untied_folder, tmp_path, name, linears, head, limit, record_property):
    weights = with_head(untied_folder, quantized(untied_folder, linears), head)
    write_checkpoint(untied_folder, tmp_path / "out", format=name, weights=weights)
    assert "lm_head.weight" not in tensor_names(tmp_path / "out") or name == "bitsandbytes"
    found = logits_of(tmp_path / "out", torch.bfloat16)
    expected = logits_of(untied_folder, torch.bfloat16, weights)
    difference = roundings(found, expected, torch.bfloat16)
    record_property("roundings", difference)
    assert difference <= limit
