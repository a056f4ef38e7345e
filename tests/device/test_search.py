"""Parts of the search that the journey of one model does not come to, on another device."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.evaluation.runtime import quantized_model
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.schemes import parse_scheme
from advisor.search.realise import realise

CASES = {
    "awq": ("awq-int4-g32-asym", {}, {}),
    "smoothquant": ("smoothquant-int8-gch-sym-aint8", {}, {}),
    "sequential awq": ("awq-int4-g32-asym", {"sequential": True}, {}),
    "rotation": (
        "gptq-int4-g32-sym",
        {"rotation": "hadamard", "sequential": True},
        {"tie_word_embeddings": False},
    ),
    "embedding": ("gguf-q4_0", {}, {"outer": "gguf-q8_0"}),
    "head": (
        "gptq-int4-g32-sym", {}, {"tie_word_embeddings": False, "head": "gptq-int4-g32-sym"}
    ),
}  # fmt: skip


def sequences():
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    return TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))


def codes(folder, device, root, scheme, settings, ends):
    """Quantize a model on a device; return codes, changed tensors and logits."""
    loaded = load_model(folder, device=device)
    store = open_store(loaded, sequences(), root=root)
    collect_statistics(loaded, sequences(), store)
    assignment = {linear.name: parse_scheme(scheme) for linear in loaded.linears}
    assignment |= {name: parse_scheme(end) for name, end in ends.items()}
    found = realise(loaded, assignment, settings, store, calibration=sequences())
    with torch.no_grad(), quantized_model(loaded.model, found.weights, found.replaced):
        logits = loaded.model(sequences().tokens[:2]).logits
    return found, logits


@pytest.mark.parametrize("name", CASES)
def test_codes_are_those_of_the_cpu(name, llama_builder, tmp_path, simulated):
    scheme, settings, model = CASES[name]
    ends = {}
    if "outer" in model:
        ends["model.embed_tokens"] = model["outer"]
    if "head" in model:
        ends["lm_head"] = model["head"]
    changes = {key: value for key, value in model.items() if key not in ("outer", "head")}
    folder = llama_builder(**changes)
    chosen = QuantizationSettings(**settings)
    here = codes(folder, "cpu", tmp_path / "here", scheme, chosen, ends)
    assert simulated.operations == 0
    # From the same statistics, which the store reads where they are wanted.
    there = codes(folder, "cuda:0", tmp_path / "here", scheme, chosen, ends)
    assert simulated.operations > 1000
    assert there[0].weights.keys() == here[0].weights.keys()
    for module, weight in there[0].weights.items():
        assert weight.codes.is_cpu
        assert weight.scales.is_cpu
        assert torch.equal(weight.codes, here[0].weights[module].codes)
    assert there[0].replaced.keys() == here[0].replaced.keys()
    assert bool(there[0].replaced) == (name not in ("embedding", "head"))
    for tensor, value in there[0].replaced.items():
        assert value.is_cpu
        assert torch.equal(value, here[0].replaced[tensor])
    assert there[1].is_cpu  # as the tokens were
    assert torch.equal(there[1], here[1])


def test_statistics_are_read_where_the_model_computes(random_llama_folder, tmp_path, simulated):
    here = load_model(random_llama_folder)
    store = open_store(here, sequences(), root=tmp_path)
    collect_statistics(here, sequences(), store)
    there = load_model(random_llama_folder, device="cuda:0")
    again = open_store(there, sequences(), root=tmp_path)
    assert again.complete  # sums of one device serve another
    for linear in here.linears[:4]:
        ours, theirs = again.layer(linear, 8), store.layer(linear, 8)
        assert ours.second_moment.is_cuda
        assert ours.gradient_moment.is_cuda
        assert ours.absolute_maximum.is_cuda
        assert torch.equal(ours.second_moment.cpu(), theirs.second_moment)
        assert again.weights(linear).is_cpu


def test_weights_stay_on_the_host_but_while_they_compute(random_llama_folder, simulated):
    loaded = load_model(random_llama_folder, device="cuda:0")
    assert loaded.device == torch.device("cuda:0")
    name = loaded.linears[0].name + ".weight"
    parameter = loaded.model.get_parameter(name)
    seen = []
    module = loaded.model.get_submodule(loaded.linears[0].name)
    module.register_forward_pre_hook(lambda *_: seen.append(parameter.is_cuda))
    with torch.no_grad():
        logits = loaded.model(torch.arange(2, 10)[None]).logits
    assert seen == [True]
    assert parameter.is_cpu
    assert logits.is_cpu
    assert loaded.tensor(name).is_cuda
    assert torch.equal(loaded.host_tensor(name), loaded.tensor(name).cpu())


def test_statistics_collected_there_differ_by_rounding_alone(
    random_llama_folder, tmp_path, simulated
):
    found = []
    for device in ("cpu", "cuda:0"):
        loaded = load_model(random_llama_folder, device=device)
        store = open_store(loaded, sequences(), root=tmp_path / device)
        collect_statistics(loaded, sequences(), store)
        found.append(store)
    here, there = found
    assert here.key == there.key
    for linear in loaded.linears:
        ours, theirs = there.layer(linear), here.layer(linear)
        for name in ("second_moment", "gradient_moment", "absolute_maximum", "absolute_sum"):
            value, expected = getattr(ours, name).cpu(), getattr(theirs, name)
            assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
        assert ours.rows == pytest.approx(theirs.rows, rel=1e-4)
        assert torch.allclose(there.weights(linear), here.weights(linear), rtol=1e-3, atol=1e-9)
