"""A model writes calibration text: tokens of its own distribution, the same each time."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advisor.calibration import own_text
from advisor.calibration.decoding import PIECE, Pieces, attend, pieced_cache
from advisor.calibration.own_text import (
    own_text_key,
    pick,
    uniforms,
    write,
    writing_dtype,
    writing_of,
)
from advisor.models.casting import casting_of
from advisor.models.load import load_model


def written_again(loaded, prompt, length, chance, banned):
    """Write with no cache: the whole sequence through the whole model for every token, float64."""
    model = loaded.model
    tokens = list(prompt)
    allowed = torch.ones(model.config.vocab_size, dtype=torch.float64)
    allowed[list(banned)] = 0
    for step in range(length):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        probabilities = torch.exp(logits - logits.max()) * allowed
        probabilities /= probabilities.sum()
        token, total = 0, 0.0
        for probability in probabilities.tolist():
            total += probability
            if total > chance[step]:
                break
            token += 1
        tokens.append(token)
    return tokens


def test_cached_keys_and_values_give_what_a_whole_pass_gives(random_llama):
    writing = writing_of(random_llama)
    found = write(random_llama, sequences=3, sequence_length=80, seed=5)
    chance = uniforms(3, 80, 5)
    for row in range(3):
        expected = written_again(random_llama, writing.prompt, 80, chance[row], writing.banned)
        assert found[row].tolist() == expected[len(writing.prompt) :]


def test_keys_and_values_in_pieces_are_those_of_transformers(random_llama):
    from transformers import DynamicCache

    tokens = torch.randint(2, 300, (2, 220), generator=torch.Generator().manual_seed(1))
    ours, theirs, at = pieced_cache(2, 220), DynamicCache(), 0
    for size in (1, 1, 70, 1, 63, 1, 83):  # within a piece, across one, across two
        part = tokens[:, at : at + size]
        a, b = (
            random_llama.model(part, past_key_values=cache, use_cache=True).logits
            for cache in (ours, theirs)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        at += size
        assert ours.get_seq_length() == at
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            found, expected = getattr(one, name), getattr(other, name)
            assert found.shape == expected.shape
            torch.testing.assert_close(found.joined(), expected, rtol=1e-5, atol=1e-5)
            room = found.room
            assert not room.movedim(0, 2).flatten(2, 3)[:, :, at:].any(), "nothing else is there"


def in_pieces(tensor, rest=0.0):
    """The same values in pieces, and others in the room that is left."""
    batch, groups, length, width = tensor.shape
    count = -(-length // PIECE)
    room = torch.full((batch, groups, count * PIECE, width), rest)
    room[:, :, :length] = tensor
    return Pieces(room.unflatten(2, (count, PIECE)).movedim(2, 0).contiguous(), length)


@pytest.mark.parametrize("length", [37, 64, 150])
@pytest.mark.parametrize(("heads", "groups", "scale"), [(9, 3, None), (4, 4, 0.3), (6, 1, None)])
def test_single_queries_attend_as_torch_says(heads, groups, scale, length):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 1, 16), (2, groups, length, 16), (2, groups, length, 24))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    attention = torch.nn.functional.scaled_dot_product_attention
    expected = attention(query, key, value, scale=scale, enable_gqa=True)
    ours = attend(query, in_pieces(key, rest=50.0), in_pieces(value, rest=7.0), scale)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    inside = attention(query, in_pieces(key), in_pieces(value), scale=scale, enable_gqa=True)
    assert torch.equal(inside, ours), "called as models call it"


def test_whatever_else_is_done_to_pieces_is_done_to_what_they_hold():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 3, 70, 16, generator=generator)
    query = torch.randn(2, 6, 70, 16, generator=generator)
    a, b = in_pieces(key), in_pieces(value)
    assert (a.shape, a.dtype, a.device) == (key.shape, key.dtype, key.device)
    assert torch.equal(a[:, :, 60:66], key[:, :, 60:66])
    assert torch.equal(torch.cat([a, b], dim=2), torch.cat([key, value], dim=2))
    assert torch.equal(query[:, ::2] @ a.transpose(-1, -2), query[:, ::2] @ key.transpose(-1, -2))
    attention = torch.nn.functional.scaled_dot_product_attention
    mask = (torch.arange(70) < 20)[None]
    for one, named in ((query[:, :, :1], {"attn_mask": mask}), (query, {"is_causal": True})):
        found = attention(one, a, b, enable_gqa=True, **named)
        assert torch.equal(found, attention(one, key, value, enable_gqa=True, **named))


class Products(TorchDispatchMode):
    """Notes the shapes of products of stacks of matrices, and how many of their arguments lay
    as no kernel takes them without a copy."""

    def __init__(self):
        super().__init__()
        self.shapes, self.scattered = set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.bmm.default:
            self.shapes.add(tuple(tuple(matrix.shape) for matrix in args))
            self.scattered += not all(
                matrix.is_contiguous() or matrix.mT.is_contiguous() for matrix in args
            )
        return func(*args, **(kwargs or {}))


def test_products_have_two_shapes_a_piece_and_copy_no_keys(random_llama):
    # oneDNN keeps the code that it makes for every shape of a product of 16-bit numbers.
    with Products() as seen:
        write(random_llama, sequences=3, sequence_length=2 * PIECE + 40, seed=0)
    kept = {shapes for shapes in seen.shapes if shapes[0][0] % 6 == 0}  # 3 rows, 2 groups
    assert len(kept) == 2 * 3
    assert seen.scattered == 0


def test_a_seed_gives_one_text_and_another_seed_another(random_llama):
    first, again, other = (
        write(random_llama, sequences=4, sequence_length=40, seed=seed) for seed in (0, 0, 1)
    )
    assert first.dtype == torch.int64
    assert first.shape == (4, 40)
    assert torch.equal(first, again)
    assert (first != other).float().mean() > 0.5
    assert len({tuple(row) for row in first.tolist()}) == 4, "sequences differ from each other"


def test_chance_depends_on_a_sequences_number_alone():
    assert torch.equal(uniforms(5, 30, 7)[:2], uniforms(2, 30, 7))
    assert torch.equal(uniforms(3, 30, 7)[:, :12], uniforms(3, 12, 7))
    values = uniforms(40, 250, 0)
    assert abs(float(values.mean()) - 0.5) < 0.02
    assert 0 <= float(values.min()) < 0.01
    assert 0.99 < float(values.max()) < 1


def test_rows_written_apart_are_those_written_together(random_llama, monkeypatch):
    together = write(random_llama, sequences=5, sequence_length=30, seed=2)
    monkeypatch.setattr(own_text, "_MOST_ROWS", 2)
    seen = []
    apart = write(
        random_llama, sequences=5, sequence_length=30, seed=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert torch.equal(apart, together)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[0] == (2, 150)
    assert seen[-1] == (150, 150)


def test_tokens_fall_by_their_probability():
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 3.0]).repeat(20_000, 1)
    chance = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    picked = pick(logits, chance, banned=[4])
    shares = torch.bincount(picked, minlength=5) / 20_000
    expected = torch.softmax(torch.tensor([2.0, -1.0, 0.5, 1.0]), 0)
    torch.testing.assert_close(shares[:4], expected, rtol=0, atol=1e-4)
    assert shares[4] == 0


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-53])
def test_the_ends_of_chance_fall_on_allowed_tokens(chance):
    logits = torch.tensor([[5.0, 1.0, 2.0, 9.0]])
    picked = pick(logits, torch.tensor([chance], dtype=torch.float64), banned=[0, 3])
    assert picked.tolist() == [1 if chance == 0 else 2]


def test_special_and_unknown_tokens_are_not_written(llama_builder):
    loaded = load_model(llama_builder(vocab_size=400, tie_word_embeddings=False))
    known = len(loaded.tokenizer)
    writing = writing_of(loaded)
    assert writing.banned == (0, 1, *range(known, 400))
    assert writing.prompt == (0,), "the token that begins a text"
    with torch.no_grad():  # the model would end every text, or leave the vocabulary
        loaded.model.lm_head.weight[[1, 399]] += 5 * loaded.model.lm_head.weight.abs().max()
    tokens = write(loaded, sequences=6, sequence_length=50, seed=0)
    assert not torch.isin(tokens, torch.tensor(writing.banned)).any()


def test_a_leading_token_of_the_tokenizer_begins_every_sequence(random_llama, monkeypatch):
    monkeypatch.setattr(own_text, "leading_tokens", lambda _: [0])
    tokens = write(random_llama, sequences=2, sequence_length=20, seed=0)
    assert tokens.shape == (2, 20)
    assert tokens[:, 0].tolist() == [0, 0]
    monkeypatch.setattr(own_text, "leading_tokens", lambda _: [])
    without = write(random_llama, sequences=2, sequence_length=19, seed=0)
    assert torch.equal(tokens[:, 1:], without), "where it is not put in front, it only prompts"


def test_sixteen_bit_weights_compute_as_they_are(llama_builder, tmp_path):
    folder = llama_builder()
    loaded = load_model(folder)
    assert writing_dtype(loaded) == torch.float32
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "narrow")
    loaded.tokenizer.save_pretrained(tmp_path / "narrow")
    narrow = load_model(tmp_path / "narrow")
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert writing_dtype(narrow) == torch.bfloat16
    tokens = write(narrow, sequences=2, sequence_length=40, seed=0)
    assert torch.equal(tokens, write(narrow, sequences=2, sequence_length=40, seed=0))
    assert casting_of(narrow.model).dtype == torch.float32, "as it was before"
    assert narrow.model(tokens).logits.dtype == torch.float32


def test_the_type_cannot_change_under_parameters_that_compute(random_llama):
    casting = casting_of(random_llama.model)
    with (
        casting.hold(random_llama.model),
        pytest.raises(RuntimeError, match="held"),
        casting.computing_in(torch.float64),
    ):
        pass


def test_the_name_of_a_kept_text_says_what_made_it(random_llama, llama_builder):
    keys = {
        own_text_key(random_llama, 32, 256, 0),
        own_text_key(random_llama, 16, 256, 0),
        own_text_key(random_llama, 32, 128, 0),
        own_text_key(random_llama, 32, 256, 1),
        own_text_key(load_model(llama_builder(num_hidden_layers=3)), 32, 256, 0),
    }
    assert len(keys) == 5
    assert own_text_key(random_llama, 32, 256, 0) in keys
