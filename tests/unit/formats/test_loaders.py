"""What each engine's loader refuses is said before any work, with every offender counted."""

from __future__ import annotations

import pytest

from advisor.errors import InputError
from advisor.formats.loaders import RULES, storing_problems
from advisor.formats.loaders import loading_problems as judge
from advisor.modelspec import LinearSpec
from advisor.schemes import parse_scheme

PARTS = {
    "self_attn.q_proj": (576, 576, "qkv"), "self_attn.k_proj": (576, 192, "qkv"),
    "self_attn.v_proj": (576, 192, "qkv"), "self_attn.o_proj": (576, 576, "o"),
    "mlp.gate_proj": (576, 1536, "gu"), "mlp.up_proj": (576, 1536, "gu"),
    "mlp.down_proj": (1536, 576, "down"),
}  # fmt: skip
LINEARS = [
    LinearSpec(
        name=f"model.layers.{block}.{part}", in_features=inputs, out_features=outputs, block=block,
        input_group=f"{block}.{group}", fused_group=f"{block}.{group}",
    )
    for block in (1, 11)
    for part, (inputs, outputs, group) in PARTS.items()
]  # fmt: skip


def loading_problems(*arguments, **options):
    return judge(*arguments, **options)[0]


def all_in(scheme: str, **other: str):
    """Every module in one scheme, but for those whose name ends in a key (dots as __)."""
    chosen = {}
    for linear in LINEARS:
        name = scheme
        for ending, given in other.items():
            if linear.name.endswith(ending.replace("__", ".")):
                name = given
        if name != "bf16":
            chosen[linear.name] = parse_scheme(name)
    return chosen


@pytest.mark.parametrize(
    ("engine", "name", "scheme"),
    [
        ("vllm", "gptq", "gptq-int4-g64-sym"),
        ("vllm", "compressed-tensors", "gptq-int4-g32-asym"),
        ("vllm", "awq", "awq-int4-g64-asym"),
        ("vllm", "safetensors", "bf16"),
        ("sglang", "compressed-tensors", "rtn-int4-g64-sym"),
        ("sglang", "compressed-tensors", "rtn-int4-g64-asym"),
        ("transformers", "gptq", "rtn-int3-g32-asym"),
        ("transformers", "compressed-tensors", "rtn-int5-g32-sym"),
        ("llama.cpp", "gguf", "gguf-q4_0"),
    ],
)
def test_uniform_checkpoints_load(engine, name, scheme):
    assert judge(engine, name, all_in(scheme), LINEARS, heads=9) == ([], [])


@pytest.mark.parametrize(
    ("name", "scheme", "words", "older"),
    [
        ("gptq", "gptq-int4-g64-asym", "symmetric int4 and int8", None),
        ("gptq", "gptq-int3-g64-sym", "symmetric int4 and int8", None),
        ("gptq", "gptq-int4-g64-sym-actorder", "no act-order groups", "0.29"),
        ("bitsandbytes", "bnb-nf4", "since release 0.28 (it is in the plugin", "0.27.1"),
        ("gguf", "gguf-q4_0", "since release 0.24 (it is in the plugin", "0.23"),
    ],
)
def test_what_releases_stopped_to_load(name, scheme, words, older):
    refusals, warnings = judge("vllm", name, all_in(scheme), LINEARS)
    assert len(refusals) == 1
    assert refusals[0].startswith("vLLM 0.32 could not load it: ")
    assert words in refusals[0]
    assert warnings == []
    if older is not None:
        refusals, warnings = judge(f"vllm=={older}", name, all_in(scheme), LINEARS)
        assert refusals == []
    if name == "gptq" and older is not None:
        assert warnings[0].startswith("vLLM 0.30 and newer do not load it: it reads no act-order")


def test_transformers_stopped_to_read_packed_zero_points():
    chosen = all_in("rtn-int3-g64-sym", mlp__down_proj="rtn-int2-g32-asym")
    refusals, warnings = judge("transformers", "compressed-tensors", chosen, LINEARS)
    assert refusals == []
    assert warnings[0].startswith("transformers 5.23 and newer do not load it: ")
    refusals, warnings = judge("transformers==5.24", "compressed-tensors", chosen, LINEARS)
    assert refusals[0].startswith("transformers 5.24 could not load it: packed integers must be ")
    assert "2 modules (first: model.layers.1.mlp.down_proj)" in refusals[0]
    assert warnings == []
    symmetric = all_in("rtn-int3-g64-sym")
    assert judge("transformers==5.24", "compressed-tensors", symmetric, LINEARS) == ([], [])
    assert judge("transformers==5.24", "gptq", all_in("rtn-int4-g64-asym"), LINEARS) == ([], [])


@pytest.mark.parametrize(
    ("engine", "name", "schemes", "words"),
    [
        ("llama.cpp", "gptq", all_in("rtn-int4-g64-sym"), ["reads gguf, not gptq"]),
        (
            "vllm", "compressed-tensors",
            all_in("rtn-int4-g64-sym", self_attn__v_proj="rtn-int8-gch-sym", mlp__up_proj="bf16"),
            ["1.qkv as one product", "11.qkv", "1.gu as one product", "11.gu"],
        ),
        ("transformers", "gptq", all_in("rtn-int4-g64-sym", mlp__down_proj="rtn-int8-g64-sym"),
         ["one setting for every linear", "2 modules (first: model.layers.1.mlp.down_proj)"]),
        ("sglang", "compressed-tensors", all_in("rtn-int4-g64-sym-afp8"),
         ["under 8 bits beneath quantized inputs, but 14 modules"]),
        ("sglang", "gptq", all_in("gptq-int3-g64-sym"),
         ["SGLang 0.5.23 could not load it", "symmetric int4 and int8"]),
        ("sglang", "compressed-tensors", all_in("rtn-int3-g64-sym"),
         ["4 or 8 bits, but 14 modules"]),
        ("vllm", "gptq", all_in("rtn-int4-g128-sym"),
         ["groups must divide the inputs (else use one scale per channel, -gch), but 12 modules"]),
    ],
)  # fmt: skip
def test_what_a_loader_refuses(engine, name, schemes, words):
    found = "\n".join(loading_problems(engine, name, schemes, LINEARS))
    for part in words:
        assert part in found, found


def test_tensor_parallelism_cuts_groups_heads_and_prequantized_bitsandbytes():
    grouped = all_in("gptq-int4-g64-sym")
    # 576 / 2 = 288 is no multiple of 64: o_proj of both blocks; 1536 / 2 = 768 is one.
    found = loading_problems("vllm", "gptq", grouped, LINEARS, heads=9, devices=2)
    assert any("2 modules (first: model.layers.1.self_attn.o_proj)" in line for line in found)
    assert any("9 attention heads cannot be shared by 2 devices" in line for line in found)
    assert loading_problems(
        "vllm", "gptq", all_in("gptq-int4-g32-sym"), LINEARS, heads=8, devices=2
    ) == []  # fmt: skip
    ordered = loading_problems(
        "vllm==0.29", "gptq", all_in("gptq-int4-g32-sym-actorder"), LINEARS, devices=2
    )
    assert "act-order" in ordered[0]
    assert "4 modules (first: model.layers.1.self_attn.o_proj)" in ordered[0]
    nf4 = loading_problems("vllm==0.27", "bitsandbytes", all_in("bnb-nf4"), LINEARS, devices=2)
    assert "splits no quantized bitsandbytes checkpoint over 2 devices" in nf4[0]


EXPERTS = [
    LinearSpec(
        name=f"model.layers.{block}.mlp.experts.{expert}.up_proj", in_features=64, out_features=64,
        block=block, input_group="g", fused_group=f"{block}.experts", is_expert=True,
    )
    for block in (0, 1)
    for expert in (0, 1)
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ("rtn-int4-g32-sym", "rtn-int4-g32-sym", True),
        ("rtn-int4-g32-sym", "gptq-int4-g32-sym", True),
        ("rtn-int4-g32-sym", "rtn-int8-g32-sym", False),
        ("rtn-int4-g32-sym", "bf16", False),
        ("bf16", "bf16", False),
        ("rtn-int4-g32-asym", "rtn-int4-g32-asym", False),
        ("rtn-int8-gch-sym-aint8", "rtn-int8-gch-sym-aint8", False),
    ],
)
def test_transformers_unpacks_all_experts_by_one_scheme(first, second, fits):
    schemes = {name.name: parse_scheme("rtn-int4-g32-sym") for name in LINEARS}
    for linear in EXPERTS:
        schemes[linear.name] = parse_scheme(second if linear.block else first)
    linears = [*LINEARS, *EXPERTS]
    found = loading_problems("transformers", "compressed-tensors", schemes, linears)
    assert (not found) == fits
    if not fits:
        assert "experts of all layers by one symmetric weight-only scheme" in found[0]
        assert "get_experts_scheme" in found[0]
    per_layer = loading_problems("vllm", "compressed-tensors", schemes, linears)
    assert per_layer == []


def test_the_same_bits_by_two_methods_are_one_scheme_to_a_loader():
    mixed = all_in("gptq-int4-g64-sym", self_attn__v_proj="rtn-int4-g64-sym")
    assert loading_problems("vllm", "compressed-tensors", mixed, LINEARS) == []


def test_names_of_16_bit_modules_that_are_parts_of_others():
    """autoawq's list is matched as parts of names: 'layers.1.x' also matches 'y.layers.1.x'."""
    outer = LinearSpec("vision.model.layers.1.mlp.down_proj", 64, 64, 0, "v", "v")
    schemes = all_in("awq-int4-g64-asym", mlp__down_proj="bf16")
    schemes[outer.name] = parse_scheme("awq-int4-g64-asym")
    found = loading_problems("transformers", "awq", schemes, [*LINEARS, outer])
    assert "also match 1 module (first: vision.model.layers.1.mlp.down_proj)" in found[0]


def test_every_rule_names_where_it_was_read():
    assert all("/" in rule.source for rule in RULES)
    found = loading_problems("vllm", "gptq", all_in("rtn-int4-g128-sym"), LINEARS)
    assert found[0].startswith("vLLM 0.32 could not load it: ")
    assert found[0].endswith("(create_weights: input size and output size per partition)).")


@pytest.mark.parametrize(
    ("name", "scheme", "static", "words"),
    [
        ("gptq", "gptq-int4-g32-sym-actorder", False, None),
        ("compressed-tensors", "gptq-int4-g32-sym-actorder", False, "act-order"),
        ("compressed-tensors", "gptq-int4-g32-sym-actorder", True, None),
        ("compressed-tensors", "gptq-int4-gch-sym-actorder", False, None),
        ("awq", "rtn-int8-g32-sym", False, "holds int4"),
        ("bitsandbytes", "rtn-int4-g32-sym", False, "holds nf4"),
    ],
)
def test_what_a_format_cannot_hold_is_known_before_a_weight_is_made(name, scheme, static, words):
    found = storing_problems(name, all_in(scheme), LINEARS, static_groups=static)
    if words is None:
        assert found == []
    else:
        assert words in found[0]
        assert "14 modules" in found[0]


def test_unknown_engines_are_named():
    with pytest.raises(InputError, match="unknown engine"):
        loading_problems("vlm", "gptq", {}, LINEARS)
