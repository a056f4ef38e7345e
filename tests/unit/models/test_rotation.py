"""Rotation of the residual stream: the function stays, statistics follow without a pass."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.rotating import rotated
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.formats.export import write_checkpoint
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.models.rotation import Rotation, rotation_matrix, rotation_of, rotation_problem
from advisor.schemes import parse_scheme
from advisor.search.realise import realise
from advisor.search.scores import ScoreBook

SCHEME = parse_scheme("gptq-int4-g32-sym")
ROTATED = QuantizationSettings(rotation="hadamard", rotation_seed=3)
TOKENS = torch.randint(2, 300, (12, 32), generator=torch.Generator().manual_seed(0))
SEQUENCES = TokenSequences(TOKENS, "random", "0" * 8, 0, hash_tokens(TOKENS))


@pytest.fixture
def folder(llama_builder):
    """Width 96 = 32 x 3: no Hadamard matrix of order 2^k; biases everywhere."""
    return llama_builder(
        "untied", tie_word_embeddings=False, hidden_size=96, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, mlp_bias=True, head_dim=32,
    )  # fmt: skip


@pytest.fixture
def loaded(folder):
    found = load_model(folder)
    with torch.no_grad():
        for name, parameter in found.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return found


@pytest.mark.parametrize("size", [64, 96, 576, 7])
def test_matrix_is_orthogonal_and_spread(size):
    matrix = rotation_matrix(size, 1)
    identity = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrix.T @ matrix, identity, rtol=0, atol=1e-12)
    odd = size // (size & -size)
    assert float(matrix.abs().max()) <= (odd / size) ** 0.5 + 1e-12
    assert not torch.equal(matrix, rotation_matrix(size, 2))


def test_the_function_stays(loaded):
    rotation = Rotation(loaded.model, 3)
    with torch.no_grad():
        before = loaded.model(TOKENS[:4]).logits
        with quantized_model(loaded.model, {}, rotation.tensors(loaded.linears)) as model:
            after = model(TOKENS[:4]).logits
            hidden = model.model.embed_tokens(TOKENS[:4])
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())
    original = loaded.model.model.embed_tokens(TOKENS[:4])
    assert float((hidden - original).norm()) > 0.5 * float(original.norm())


def _save(loaded, rotation, source, target):
    """Write the rotated model as a 16-bit checkpoint that transformers loads as it is."""
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    current = dict(loaded.model.named_parameters())
    tensors = {name: current[name].detach().clone() for name in tensors}
    tensors |= {n: t.contiguous() for n, t in rotation.tensors(loaded.linears).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def test_statistics_are_those_of_a_pass_over_the_rotated_model(loaded, folder, tmp_path):
    rotation = Rotation(loaded.model, 3)
    _save(loaded, rotation, folder, tmp_path / "rotated")
    other = load_model(tmp_path / "rotated")
    first = open_store(loaded, SEQUENCES, root=tmp_path / "a")
    second = open_store(other, SEQUENCES, root=tmp_path / "b")
    collect_statistics(loaded, SEQUENCES, first)
    collect_statistics(other, SEQUENCES, second)
    for linear in loaded.linears:
        ours = rotated(rotation, linear, first.layer(linear))
        theirs = second.layer(linear)
        for name in ("second_moment", "gradient_moment"):
            a, b = getattr(ours, name).double(), getattr(theirs, name).double()
            assert float((a - b).norm() / b.norm()) < 2e-3, (linear.name, name)
            raw = getattr(first.layer(linear), name).double()
            moved = float((raw - b).norm() / b.norm())
            turned = linear.name.endswith(("o_proj", "down_proj")) == (name == "gradient_moment")
            assert (moved > 0.1) == turned, (linear.name, name)
        ratio = ours.absolute_sum.double() / theirs.absolute_sum.double()
        assert 0.5 < float(ratio.min()) < float(ratio.max()) < 2.0, linear.name


def test_a_diagonal_gradient_keeps_its_trace(loaded):
    rotation = Rotation(loaded.model, 3)
    writer = next(m for m in loaded.linears if m.name.endswith("down_proj"))
    diagonal = torch.rand(96)
    found = rotation.gradient_moment(writer, diagonal)
    exact = rotation.gradient_moment(writer, torch.diag(diagonal)).diagonal()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_codes_and_checkpoint_of_a_rotated_model(loaded, folder, tmp_path):
    """What is written loads as any checkpoint does, and computes what was measured."""
    plain = load_model(folder)  # the biases as stored
    store = open_store(plain, SEQUENCES, root=tmp_path / "s")
    collect_statistics(plain, SEQUENCES, store)
    names = [linear.name for linear in plain.linears]
    assignment = dict.fromkeys(names[:-1], SCHEME)  # the last stays in 16 bits, rotated
    found = realise(plain, assignment, ROTATED, store)
    again = realise(plain, assignment, ROTATED, store)
    assert all(torch.equal(found.weights[n].codes, again.weights[n].codes) for n in found.weights)
    with quantized_model(plain.model, found.weights, found.replaced) as model, torch.no_grad():
        ours = model(TOKENS[:2]).logits
    with torch.no_grad():
        exact = plain.model(TOKENS[:2]).logits
    assert float((ours - exact).norm() / exact.norm()) < 0.5
    write_checkpoint(
        folder, tmp_path / "out", format="compressed-tensors", weights=found.weights,
        replaced=found.replaced,
    )  # fmt: skip
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    import transformers

    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        theirs = served(TOKENS[:2]).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 2e-2


def test_sequential_codes_see_the_rotated_prefix(loaded, tmp_path):
    """With unquantized blocks in front, the prefix's moments are the closed form's."""
    from advisor.search.sequential import QuantizedPrefix

    rotation = Rotation(loaded.model, 3)
    store = open_store(loaded, SEQUENCES, root=tmp_path)
    collect_statistics(loaded, SEQUENCES, store)
    prefix = QuantizedPrefix(
        loaded, TOKENS, tmp_path, ROTATED,
        lambda linear: store.weights(linear).reshape(TOKENS.shape), rotation,
    )  # fmt: skip
    for linear in loaded.linears:
        inputs = prefix.inputs(linear, {})
        closed = rotated(rotation, linear, store.layer(linear)).second_moment
        seen = inputs.statistics.second_moment
        assert float((seen - closed).norm() / closed.norm()) < 1e-3, linear.name
        weight = rotation.weight(linear)
        moved = inputs.target(weight, 1.0)
        assert float((moved - weight).norm() / weight.norm()) < 1e-2, "nothing to make up for"


def test_scores_of_a_rotated_family_are_its_own(loaded, tmp_path):
    store = open_store(loaded, SEQUENCES, root=tmp_path)
    collect_statistics(loaded, SEQUENCES, store)
    book = ScoreBook(loaded, store, tmp_path / "scores")
    plain = book.scores([SCHEME], QuantizationSettings(), None)[SCHEME]
    turned = book.scores([SCHEME], ROTATED, None)[SCHEME]
    assert plain.keys() == turned.keys()
    assert all(plain[name] != turned[name] for name in plain)
    ratio = sum(s.kl for s in turned.values()) / sum(s.kl for s in plain.values())
    assert 0.2 < ratio < 5


def test_tied_heads_and_inner_norms_are_refused(random_llama, loaded):
    assert rotation_problem(loaded.model) is None
    with pytest.raises(InputError, match=r"one tensor, which a rotation makes two: 0\.0 MB more"):
        rotation_of(random_llama.model, "hadamard", 0)
    with pytest.raises(InputError, match="must be one of none, hadamard"):
        rotation_of(loaded.model, "fourier", 0)
    with torch.no_grad():
        loaded.model.model.norm.weight[3] = 0
    assert "next to zero" in rotation_problem(loaded.model)


def test_scales_and_rotation_do_not_mix(loaded, tmp_path):
    awq = {linear.name: parse_scheme("awq-int4-g32-sym") for linear in loaded.linears}
    with pytest.raises(InputError, match="fold no scales"):
        realise(loaded, awq, ROTATED, None)
