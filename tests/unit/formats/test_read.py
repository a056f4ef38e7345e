"""Reading: schemes resolved as loaders do, and faults that name the module."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor.errors import VerificationError
from advisor.formats.export import write_checkpoint
from advisor.formats.read import read_checkpoint
from advisor.formats.registry import storage_scheme
from advisor.schemes import parse_scheme

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def written(bf16_folder, quantized, tmp_path):
    """Write a checkpoint and return its folder: ``written("gptq", "rtn-int4-g32-sym")``."""

    def build(name, choose):
        write_checkpoint(bf16_folder, tmp_path / "out", format=name, weights=quantized(choose))
        return tmp_path / "out"

    return build


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


SCALES = [
    ("gptq", "rtn-int4-g32-sym", "scales"),
    ("awq", "rtn-int4-g32-sym", "scales"),
    ("compressed-tensors", "rtn-int4-g32-sym", "weight_scale"),
    ("compressed-tensors", "rtn-int8-gch-sym-aint8", "weight_scale"),
    ("bitsandbytes", "bnb-nf4", "weight.absmax"),
    ("bitsandbytes", "llm.int8", "SCB"),
]


@pytest.mark.parametrize(("name", "scheme", "suffix"), SCALES)
def test_a_missing_scale_names_its_module(written, name, scheme, suffix):
    folder = written(name, scheme)
    change_tensors(folder, lambda tensors: tensors.pop(f"{UP}.{suffix}"))
    with pytest.raises(VerificationError, match=f"{UP} has no|'{UP}.{suffix}' is missing"):
        read_checkpoint(folder)
    found = read_checkpoint(folder, allow_faults=True)
    assert len(found.problems) == 1
    assert set(found.modules) == {m for m in found.modules if m != UP}


@pytest.mark.parametrize(("name", "scheme", "suffix"), SCALES)
def test_a_scale_of_the_wrong_shape_names_its_module(written, name, scheme, suffix):
    folder = written(name, scheme)

    def halve(tensors):
        tensors[f"{UP}.{suffix}"] = tensors[f"{UP}.{suffix}"][:1].clone()

    change_tensors(folder, halve)
    with pytest.raises(VerificationError, match=rf"{UP}: .* has shape \[1.*expected"):
        read_checkpoint(folder)


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed-tensors"])
def test_a_group_size_in_the_config_that_contradicts_the_shapes(written, name):
    folder = written(name, "rtn-int4-g32-sym")

    def edit(config):
        if name == "compressed-tensors":
            config["config_groups"]["group_0"]["weights"]["group_size"] = 16
        else:
            config["group_size"] = 16

    change_config(folder, edit)
    with pytest.raises(VerificationError, match=r"is faulty\. 14 problems:\n") as caught:
        read_checkpoint(folder)
    assert "model.layers.0.mlp.down_proj: " in str(caught.value)
    assert "... and 4 more" in str(caught.value)
    assert any(
        UP in problem and "16" in problem
        for problem in read_checkpoint(folder, allow_faults=True).problems
    )


def test_bits_in_the_config_that_contradict_the_shapes(written):
    folder = written("gptq", "rtn-int4-g32-sym")
    change_config(folder, lambda config: config.update(bits=8))
    with pytest.raises(VerificationError, match="qweight holds 32 inputs at 8 bits"):
        read_checkpoint(folder)


@pytest.mark.parametrize(("name", "scheme", "suffix"), SCALES)
def test_modules_that_the_config_keeps_16_bit_but_are_not(written, name, scheme, suffix):
    folder = written(name, scheme)
    key = {"awq": "modules_to_not_convert", "bitsandbytes": "llm_int8_skip_modules"}

    def edit(config):
        if name == "gptq":
            config["dynamic"] = {f"-:{UP}": {}}
        else:
            config[key.get(name, "ignore")].append(UP)

    change_config(folder, edit)
    with pytest.raises(VerificationError, match=f"{UP}: config.json keeps it 16-bit"):
        read_checkpoint(folder)


def test_unknown_formats_and_empty_promises(written):
    folder = written("gptq", "rtn-int4-g32-sym")
    change_config(folder, lambda config: config.update(quant_method="gptqq"))
    with pytest.raises(VerificationError, match=r"'gptqq' is not read here.*Did you mean 'gptq'"):
        read_checkpoint(folder)
    change_config(folder, lambda config: config.update(quant_method="bitsandbytes"))
    with pytest.raises(VerificationError, match="neither 4-bit nor 8-bit"):
        read_checkpoint(folder)


def test_gptq_zero_points_and_indices_that_loaders_would_disagree_on(written):
    folder = written("gptq", "rtn-int4-g32-sym")

    def flip(tensors):
        tensors[f"{UP}.qzeros"][0, 0] ^= 1

    change_tensors(folder, flip)
    with pytest.raises(VerificationError, match="says sym, but qzeros are not all 8"):
        read_checkpoint(folder).weight(UP)

    def swap(tensors):
        tensors[f"{UP}.qzeros"][0, 0] ^= 1
        tensors[f"{UP}.g_idx"][0] = 1

    change_tensors(folder, swap)
    with pytest.raises(VerificationError, match="desc_act=false, but g_idx is not consecutive"):
        read_checkpoint(folder).weight(UP)


def test_gptq_mixtures_resolve_under_single_and_fused_names(written):
    """vLLM asks for qkv_proj, gptqmodel for q_proj: both must find the same rule."""
    from advisor.formats.gptq_config import resolve_rule

    def choose(module):
        if "layers.0.self_attn" in module:
            return "rtn-int8-gch-sym"
        return None if "layers.0.mlp" in module else "rtn-int4-g32-sym"

    folder = written("gptq", choose)
    checkpoint = read_checkpoint(folder)
    assert str(checkpoint.modules["model.layers.0.self_attn.k_proj"]) == "gptq-int8-gch-sym"
    assert str(checkpoint.modules[UP]) == "gptq-int4-g32-sym"
    assert "model.layers.0.mlp.up_proj" not in checkpoint.modules
    fused = resolve_rule("model.layers.0.self_attn.qkv_proj", checkpoint.config)
    assert (fused["bits"], fused["group_size"]) == (8, -1)
    assert resolve_rule("model.layers.0.mlp.gate_up_proj", checkpoint.config) is None
    # No expression may reach a neighbour whose name begins the same.
    assert resolve_rule("model.layers.0.self_attn.qkv_proj_extra", checkpoint.config)["bits"] == 4
    assert checkpoint.config["checkpoint_format"] == "gptq"


def test_gptq_zero_points_of_0_need_the_second_format(written, quantized):
    folder = written("gptq", "rtn-int2-g32-asym")
    weights = quantized("rtn-int2-g32-asym")
    assert any(bool((weight.zero_points == 0).any()) for weight in weights.values()) == (
        read_checkpoint(folder).config["checkpoint_format"] == "gptq_v2"
    )


def test_compressed_tensors_names_every_module_of_a_mixture(written):
    folder = written(
        "compressed-tensors",
        lambda module: None if "o_proj" in module
        else "rtn-int8-gch-sym-aint8" if "mlp" in module else "rtn-int4-g32-sym",
    )  # fmt: skip
    config = read_checkpoint(folder).config
    assert config["format"] == "mixed-precision"
    assert {group["format"] for group in config["config_groups"].values()} == {
        "pack-quantized",
        "int-quantized",
    }
    assert config["ignore"] == [
        "lm_head",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    targets = [group["targets"] for group in config["config_groups"].values()]
    # Every module, and what engines fuse: SGLang looks qkv_proj itself up.
    assert sorted(map(len, targets)) == [8, 8]
    named = {target for group in targets for target in group}
    assert {"model.layers.1.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"} <= named


def test_a_target_without_tensors_is_a_fault(written):
    folder = written("compressed-tensors", lambda m: None if "o_proj" in m else "rtn-int4-g32-sym")
    gone = "model.layers.0.mlp.up_proj.weight"

    def drop(tensors):
        for suffix in ("_packed", "_scale", "_shape"):
            tensors.pop(gone + suffix)

    change_tensors(folder, drop)
    with pytest.raises(
        VerificationError, match=r"model\.layers\.0\.mlp\.up_proj has no weight_packed"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("scheme", "name", "stored"),
    [
        ("rtn-int4-g64-sym", "gptq", "gptq-int4-g64-sym"),
        ("gptq-int4-gch-sym-actorder", "gptq", "gptq-int4-gch-sym"),
        ("gptq-int4-g64-sym-actorder", "gptq", "gptq-int4-g64-sym-actorder"),
        ("awq-int4-g64-sym", "awq", "awq-int4-g64-asym"),
        ("gptq-int4-g64-asym", "compressed-tensors", "rtn-int4-g64-asym"),
        ("smoothquant-int8-gch-sym-aint8", "compressed-tensors", "rtn-int8-gch-sym-aint8"),
        ("bnb-nf4-dq", "bitsandbytes", "bnb-nf4-dq"),
        ("llm.int8", "bitsandbytes", "llm.int8"),
    ],
)
def test_what_can_be_read_back_of_a_scheme(scheme, name, stored):
    assert str(storage_scheme(parse_scheme(scheme), name)) == stored


def test_a_flipped_code_changes_the_weight_that_is_read(written, quantized):
    folder = written("compressed-tensors", "rtn-int4-g32-sym")

    def flip(tensors):
        tensors[f"{UP}.weight_packed"][3, 2] ^= 1 << 4

    change_tensors(folder, flip)
    found = read_checkpoint(folder).weight(UP).codes
    expected = quantized("rtn-int4-g32-sym")[UP].codes
    different = torch.nonzero(found != expected).tolist()
    assert different == [[3, 2 * 8 + 1]]


@pytest.mark.parametrize("kind", ["naive-quantized", "int-quantized"])
@pytest.mark.parametrize("scheme", ["rtn-int4-g32-asym", "rtn-int8-gch-sym", "rtn-int3-g16-sym"])
def test_integers_that_others_stored_as_they_are(written, quantized, kind, scheme):
    """naive-quantized and weight-only int-quantized: signed bytes, zero points alike."""
    folder = written("compressed-tensors", scheme)
    weights = quantized(scheme)

    def change(tensors):
        for name, weight in weights.items():
            half = 2 ** (int(weight.scheme.bits) - 1)
            for suffix in ("weight_packed", "weight_shape"):
                del tensors[f"{name}.{suffix}"]
            tensors[f"{name}.weight"] = (weight.codes.to(torch.int16) - half).to(torch.int8)
            if weight.zero_points is not None:
                zeros = (weight.zero_points.to(torch.int16) - half).to(torch.int8)
                tensors[f"{name}.weight_zero_point"] = zeros

    def name_kind(config):
        config["format"] = kind
        config["config_groups"]["group_0"]["format"] = kind

    change_tensors(folder, change)
    change_config(folder, name_kind)
    checkpoint = read_checkpoint(folder)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.weight(name).dequantize(), weight.dequantize())
