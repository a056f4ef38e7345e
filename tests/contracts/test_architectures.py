"""Every architecture through the same checks, on a tiny random instance of transformers' class."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.own_text import uniforms, write, writing_of
from advisor.models.architectures import ARCHITECTURES
from advisor.models.blocks import BlockRunner
from advisor.models.checkpoint import iterate_tensors
from advisor.models.folding import fold_scales, foldable_groups
from advisor.models.inspect import find_linears
from advisor.models.load import load_model
from advisor.modelspec import read_model_folder

TOKENS = torch.arange(3, 33).reshape(2, 15)


@pytest.fixture(scope="module")
def loaded(tiny):
    """Load a case by name, once; do not change its weights."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = load_model(tiny(name)[0])
        return models[name]

    return get


def test_the_model_computes_what_transformers_does(case, tiny, loaded):
    theirs = tiny(case)[1](TOKENS).logits
    ours = loaded(case).model(TOKENS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_the_table_has_every_tensor_of_the_checkpoint(case, tiny):
    folder, _ = tiny(case)
    stored = {name: tuple(tensor.shape) for name, tensor in iterate_tensors(folder)}
    spec = read_model_folder(folder)
    assert {tensor.name: tensor.shape for tensor in spec.tensors} == stored


def test_linears_of_the_loaded_model_are_those_of_the_table(case, tiny, loaded):
    folder, _ = tiny(case)
    spec, model = read_model_folder(folder), loaded(case)
    assert model.linears == find_linears(model.model) == spec.linears
    stored = dict(iterate_tensors(folder))
    for linear in model.linears:
        weight = model.model.get_submodule(linear.name).weight
        transposed = ARCHITECTURES[spec.architecture].transposed
        expected = stored[f"{linear.name}.weight"]
        assert torch.equal(weight, expected.T if transposed else expected)
        assert weight.shape == (linear.out_features, linear.in_features)


def test_blocks_one_by_one_are_the_model(case, loaded):
    model = loaded(case).model
    runner = BlockRunner(model)
    hidden = runner.embed(TOKENS)
    with torch.no_grad():
        for index in range(len(runner.blocks)):
            hidden = runner.run(index, hidden)
        expected = model(TOKENS).logits
        torch.testing.assert_close(runner.head(hidden), expected, rtol=1e-4, atol=1e-4)


def test_linears_of_an_input_group_read_the_same(case, loaded):
    model = loaded(case)
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for linear in model.linears:

        def keep(_, arguments, name=linear.name):
            seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).clone()

        handles.append(model.model.get_submodule(linear.name).register_forward_pre_hook(keep))
    with torch.no_grad():
        model.model(TOKENS)
    for handle in handles:
        handle.remove()
    groups: dict[str, list[str]] = {}
    for linear in model.linears:
        groups.setdefault(linear.input_group, []).append(linear.name)
    for first, *others in groups.values():
        assert all(torch.equal(seen[first], seen[name]) for name in others if first in seen)
    # And no two groups that are apart could have been one, but for the experts of a mixture.
    inputs = [seen[names[0]] for names in groups.values() if names[0] in seen]
    same = [
        (a, b)
        for a in range(len(inputs))
        for b in range(a)
        if inputs[a].shape == inputs[b].shape and torch.equal(inputs[a], inputs[b])
    ]
    assert not same


def test_folding_keeps_the_function(case, tiny):
    model = load_model(tiny(case)[0]).model
    before = model(TOKENS).logits
    tensors = dict(model.state_dict())
    foldings = foldable_groups(model)
    generator = torch.Generator().manual_seed(1)
    for folding in foldings:
        size = tensors[f"{folding.linears[0]}.weight"].shape[1]
        scales = torch.rand(size, generator=generator) + 0.5
        tensors.update(fold_scales(tensors, folding, scales))
    assert foldings or case == "opt-350m"
    model.load_state_dict(tensors)
    after = model(TOKENS).logits
    assert not torch.equal(before, after)
    scale = float(before.abs().max())
    torch.testing.assert_close(after / scale, before / scale, rtol=0, atol=1e-5)


def test_every_architecture_has_a_case(cases):
    assert {case.architecture for case in cases.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text_written_token_by_token_follows_the_models_own_distribution(
    case, tiny, loaded, dtype, tmp_path
):
    if dtype == "bfloat16":
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tiny(case)[0], dtype=torch.bfloat16
        )
        theirs.save_pretrained(tmp_path / "narrow")
        loaded(case).tokenizer.save_pretrained(tmp_path / "narrow")
        model = load_model(tmp_path / "narrow")
    else:
        model = loaded(case)
    written = write(model, sequences=2, sequence_length=24, seed=1)
    writing, chance = writing_of(model), uniforms(2, 24, 1)
    assert not writing.kept
    whole = torch.cat([torch.tensor(writing.prompt).expand(2, -1), written], dim=1)
    with torch.no_grad():
        logits = model.model(whole, use_cache=False).logits[:, len(writing.prompt) - 1 : -1]
    logits = logits.double()
    logits[..., list(writing.banned)] = -torch.inf
    shares = torch.softmax(logits, dim=-1)
    own = shares.gather(-1, written[..., None])[..., 0]
    above = shares.cumsum(-1).gather(-1, written[..., None])[..., 0]
    # Chance falls on the written token's share, in 16 bits on it or close to it.
    off = torch.maximum(chance - above, above - own - chance)
    assert (own > 0).all()
    assert float(off.max()) <= (1e-5 if dtype == "float32" else 0.1)
