"""Every architecture, from statistics to a checkpoint that transformers loads."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import save_file

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.formats.compressed_tensors_config import resolve_module
from advisor.formats.export import write_checkpoint
from advisor.formats.gptq_config import resolve_rule
from advisor.formats.layouts import engine_problems
from advisor.formats.read import read_checkpoint
from advisor.formats.registry import get_format, storage_scheme
from advisor.methods.settings import QuantizationSettings
from advisor.models.checkpoint import iterate_tensors
from advisor.models.folding import foldable_groups
from advisor.models.load import load_model
from advisor.schemes import BF16, parse_scheme
from advisor.search.realise import realise

TOKENS = torch.arange(3, 33).reshape(2, 15)
SETTINGS = QuantizationSettings(scale_dtype="float32", scale_steps=3)
_AWQ, _GPTQ = parse_scheme("awq-int4-g4-sym"), parse_scheme("gptq-int4-g4-sym")
_EIGHT = parse_scheme("gptq-int8-gch-sym")


@pytest.fixture(scope="module")
def realised(tiny, tmp_path_factory):
    """Statistics and codes of a case, once: (model, assignment, realised)."""
    cache = tmp_path_factory.mktemp("statistics")
    known = {}

    def get(case):
        if case not in known:
            loaded = load_model(tiny(case)[0])
            tokens = torch.randint(2, 300, (8, 16), generator=torch.Generator().manual_seed(5))
            sequences = TokenSequences(tokens, "random", "0" * 64, 0, hash_tokens(tokens))
            store = open_store(loaded, sequences, root=cache)
            collect_statistics(loaded, sequences, store)
            assignment = mixture(loaded)
            known[case] = loaded, assignment, realise(loaded, assignment, SETTINGS, store)
        return known[case]

    return get


def mixture(loaded):
    """AWQ wherever scales fold into a norm, 8 bits and 16 bits in places, else GPTQ."""
    folded = {f.input_group for f in foldable_groups(loaded.model) if f.producer_kind == "norm"}
    awq = {linear.fused_group for linear in loaded.linears if linear.input_group in folded}
    last = max(linear.block for linear in loaded.linears)
    chosen = {}
    for linear in loaded.linears:
        attention = "attn" in linear.name or "attention" in linear.name
        if linear.is_expert:
            chosen[linear.name] = _GPTQ
        elif linear.fused_group in awq:
            chosen[linear.name] = _AWQ
        elif linear.block == last and attention:
            chosen[linear.name] = BF16
        else:
            chosen[linear.name] = _EIGHT if attention else _GPTQ
    return chosen


def simulated(loaded, made):
    with torch.no_grad(), quantized_model(loaded.model, made.weights, made.replaced) as model:
        return model(TOKENS).logits


def check_read_back(folder, format, assignment, made):
    """What is written is read back: every scheme and every weight, to the bit."""
    checkpoint = read_checkpoint(folder)
    expected = {
        name: storage_scheme(scheme, format)
        for name, scheme in assignment.items()
        if scheme.is_quantized
    }
    assert checkpoint.modules == expected
    for name, weight in made.weights.items():
        assert torch.equal(checkpoint.weight(name).dequantize(), weight.dequantize())


def test_transformers_computes_what_was_measured(case, realised, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded, assignment, made = realised(case)
    write_checkpoint(
        loaded.folder, tmp_path / "out", format="compressed-tensors", weights=made.weights,
        replaced=made.replaced,
    )  # fmt: skip
    check_read_back(tmp_path / "out", "compressed-tensors", assignment, made)
    if engine_problems(type(loaded.model).__name__, "compressed-tensors", "transformers"):
        assert case == "gpt2" or case.startswith("falcon")
        return  # transformers cannot load it; `tune` says so
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    expected = simulated(loaded, made)
    with torch.no_grad():
        found = theirs(TOKENS).logits
    scale = float(expected.abs().max())
    assert float((expected - loaded.model(TOKENS).logits).abs().max()) > 1e-3 * scale
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon-7b", "mixtral", "qwen2-moe"])
def test_gptq_checkpoints_are_read_back_and_leave_the_rest_as_it_was(name, realised, tmp_path):
    loaded, assignment, made = realised(name)
    write_checkpoint(
        loaded.folder, tmp_path / "out", format="gptq", weights=made.weights, replaced=made.replaced
    )
    check_read_back(tmp_path / "out", "gptq", assignment, made)
    tensors = dict(loaded.model.state_dict())
    for key, stored in read_checkpoint(tmp_path / "out").other_tensors():
        expected = made.replaced.get(key, tensors[key])
        assert torch.equal(stored, expected.to(stored.dtype))


def test_engines_find_one_scheme_for_the_experts_of_a_layer(realised):
    """vLLM asks compressed-tensors for <path>.0.gate_proj, and gptq's rules for <path> itself."""
    _, assignment, made = realised("mixtral")
    config = get_format("compressed-tensors").quantization_config(made.weights, [])
    experts = "model.layers.1.block_sparse_moe.experts"
    for leaf in ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"):
        scheme, _ = resolve_module(f"{experts}.0.{leaf}", config)
        assert scheme == storage_scheme(assignment[f"{experts}.0.w1"], "compressed-tensors")
    config = get_format("gptq").quantization_config(made.weights, [])
    of_path, of_expert = (resolve_rule(name, config) for name in (experts, f"{experts}.3.w2"))
    assert of_path == of_expert
    assert (of_path["bits"], of_path["group_size"]) == (4, 4)
    kept = get_format("gptq").quantization_config(
        {name: weight for name, weight in made.weights.items() if "experts" not in name},
        [name for name in made.weights if "experts" in name],
    )
    assert resolve_rule(experts, kept) is resolve_module(f"{experts}.3.w2", kept) is None


def test_bitsandbytes_refuses_experts_that_no_loader_would_read(realised, tmp_path):
    loaded, _, _ = realised("qwen3-moe")
    experts = [linear.name for linear in loaded.linears if linear.is_expert]
    assignment = dict.fromkeys(experts, parse_scheme("bnb-nf4"))
    made = realise(loaded, assignment, SETTINGS, None)
    with pytest.raises(InputError, match="experts of a layer in one parameter"):
        write_checkpoint(
            loaded.folder, tmp_path / "out", format="bitsandbytes", weights=made.weights
        )
    assert not (tmp_path / "out").exists()


def test_names_without_the_first_part_are_completed(tiny, tmp_path):
    """openai-community/gpt2 stores h.0.attn.c_attn.weight."""
    folder = shutil.copytree(tiny("gpt2")[0], tmp_path / "old")
    tensors = dict(iterate_tensors(folder))
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(folder)
    assignment = {loaded.linears[0].name: parse_scheme("rtn-int4-g32-sym")}
    made = realise(loaded, assignment, SETTINGS, None)
    write_checkpoint(folder, tmp_path / "out", format="gptq", weights=made.weights)
    check_read_back(tmp_path / "out", "gptq", assignment, made)
    written = {name for name, _ in read_checkpoint(tmp_path / "out").other_tensors()}
    weight = f"{loaded.linears[0].name}.weight"
    assert written == tensors.keys() - {weight}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("opt", "bnb-nf4"), ("pythia", "bnb-nf4"), ("gpt2", "bnb-nf4"), ("gpt2", "llm.int8")],
)
def test_bitsandbytes_computes_what_was_measured(name, scheme, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    loaded = load_model(tiny(name)[0])
    assignment = dict.fromkeys((m.name for m in loaded.linears), parse_scheme(scheme))
    made = realise(loaded, assignment, SETTINGS, None)
    write_checkpoint(loaded.folder, tmp_path / "out", format="bitsandbytes", weights=made.weights)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(TOKENS).logits
    expected = simulated(loaded, made)
    # Their product runs in 16 bits.
    assert (found - expected).norm() < 0.03 * expected.norm()
