"""Mixtures of several models, as SGLang would resolve them: every layer gets what was planned."""

from __future__ import annotations

import pytest
import sglang_lookup as twin

from advisor.formats.compressed_tensors_config import build_config
from advisor.formats.layouts import is_side_linear
from advisor.formats.loaders import loading_problems
from advisor.formats.registry import storage_scheme
from advisor.predict.models import load_modelspec
from advisor.schemes import BF16, parse_scheme

MODELS = ("llama-3.1-8b", "Qwen2.5-7B", "gemma-3-1b-it", "mistralai/Mixtral-8x7B-v0.1",
          "Qwen/Qwen3-30B-A3B")  # fmt: skip
ATTENTION, MLP, DOWN = (
    parse_scheme(name) for name in ("gptq-int4-g128-sym", "nvfp4-anvfp4", "rtn-fp8-gch-afp8")
)


def _plan(linear, experts):
    """Attention int4, MLPs NVFP4 and FP8, outputs of attention and every third block 16-bit."""
    if linear.is_expert:
        return experts if linear.block % 3 else BF16
    if "o_proj" in linear.name or linear.block % 3 == 0:
        return BF16
    if "attn" in linear.name:
        return ATTENTION
    return DOWN if "down_proj" in linear.name else MLP


@pytest.mark.parametrize("fused", [{}, twin.FUSED], ids=["unknown", "known"])
@pytest.mark.parametrize("model", MODELS)
def test_every_layer_of_a_mixture_gets_its_group(model, fused):
    spec = load_modelspec(model)
    some = [linear for linear in spec.linears if linear.block < 6]
    linears = [linear for linear in some if not is_side_linear(linear.name)]
    planned = {linear.name: _plan(linear, MLP) for linear in linears}
    quantized = {
        name: storage_scheme(scheme, "compressed-tensors")
        for name, scheme in planned.items()
        if scheme.is_quantized
    }
    kept = [name for name in planned if name not in quantized]
    config = build_config(quantized, kept)
    assert loading_problems("sglang", "compressed-tensors", quantized, linears)[0] == []
    keys = {str(scheme): key for scheme, key in zip(
        sorted(set(quantized.values()), key=str), config["config_groups"], strict=True
    )}  # fmt: skip
    paths = set()
    for linear in linears:
        expected = keys.get(str(quantized.get(linear.name)))
        if linear.is_expert:
            path = linear.name.partition(".experts.")[0] + ".experts"
            if path in paths:
                continue
            paths.add(path)
            assert twin.group_of_experts(path, config, fused) == expected, linear.name
        else:
            assert twin.group_of(linear.fused_group, config, fused) == expected, linear.name
            # Engines that do not fuse look the module up.
            assert twin.group_of(linear.name, config, fused) == expected, linear.name


@pytest.mark.parametrize("fused", [{}, twin.FUSED], ids=["unknown", "known"])
def test_uniform_checkpoints_go_by_the_class(fused):
    spec = load_modelspec("llama-3.1-8b")
    config = build_config(dict.fromkeys((m.name for m in spec.linears), DOWN), [])
    for linear in spec.linears:
        assert twin.group_of(linear.fused_group, config, fused) == "group_0"


def test_parts_of_a_fused_layer_that_differ_are_what_the_rule_refuses():
    """Without the rule SGLang would take the first part's scheme for all, without a word."""
    spec = load_modelspec("llama-3.1-8b")
    schemes = {m.name: MLP if "k_proj" in m.name else ATTENTION for m in spec.linears}
    config = build_config(schemes, [])
    assert twin.group_of("model.layers.0.self_attn.qkv_proj", config, twin.FUSED) is not None
    with pytest.raises(ValueError, match="no target"):
        twin.group_of("model.layers.0.self_attn.qkv_proj", config, {})
    refusals, _ = loading_problems("sglang", "compressed-tensors", schemes, spec.linears)
    assert any("must share a scheme" in refusal for refusal in refusals)


def test_blocks_of_fp8_beside_anything_else_are_refused():
    """Their size is looked for in the group of the class Linear alone."""
    spec = load_modelspec("llama-3.1-8b")
    blocks = parse_scheme("rtn-fp8-b128-afp8")
    schemes = dict.fromkeys((m.name for m in spec.linears), blocks)
    assert loading_problems("sglang", "compressed-tensors", schemes, spec.linears)[0] == []
    some = {name: scheme for name, scheme in schemes.items() if "down_proj" not in name}
    for mixed in (some, schemes | dict.fromkeys(schemes.keys() - some.keys(), DOWN)):
        (refusal,), _ = loading_problems("sglang", "compressed-tensors", mixed, spec.linears)
        assert "size of FP8 blocks where all linears share one scheme" in refusal
    assert loading_problems("vllm", "compressed-tensors", some, spec.linears)[0] == []
