"""Mixes of sources: sums of each source combined are the sums of a run over the mix itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.calibration import sources
from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.mixing import mixes, of_mix, sequence_weights
from advisor.calibration.sources import collect, open_statistics
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import InputError
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.realise import realise
from advisor.search.scores import ScoreBook

SETTINGS = QuantizationSettings()
SCHEME = parse_scheme("gptq-int3-g32-sym")


def _sequences(sources):
    """Sequences whose tokens come from another half of the vocabulary for each source."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randint(2 + 150 * (name != "a"), 150 + 150 * (name != "a"), (24,),
                      generator=generator)
        for name in sources
    ]  # fmt: skip
    tokens = torch.stack(rows)
    return TokenSequences(tokens, "a + b", "0" * 8, 0, hash_tokens(tokens), tuple(sources))


@pytest.fixture
def drawn():
    return _sequences(["a", "a", "b", "a"] * 4)


@pytest.fixture
def store(random_llama, drawn):
    found = open_statistics(random_llama, drawn)
    assert not found.complete
    collect(random_llama, drawn, found)
    assert found.complete
    return found


def _moment(model, name, rows, weights):
    """Σ w x xᵀ over tokens, float64, from hooks on the whole model; weights [sequences, length]."""
    total = 0
    for tokens, weight in zip(rows, weights.double(), strict=True):
        seen = []
        handle = model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, seen=seen: seen.append(arguments[0][0].double())
        )
        with torch.no_grad():
            model(tokens[None])
        handle.remove()
        total = total + (weight[:, None] * seen[0]).T @ seen[0]
    return total


@pytest.mark.parametrize("samples", [8, 16])
@pytest.mark.parametrize("mix", ["given", "equal", "only a", "only b"])
def test_a_mix_has_the_sums_of_its_weighted_sequences(random_llama, store, drawn, mix, samples):
    linear = next(m for m in random_llama.linears if m.name.endswith("1.mlp.gate_proj"))
    found = of_mix(store, mix).layer(linear, samples)
    used = drawn.first(samples)
    weights = sequence_weights(used, mix)
    assert float(weights.sum()) == pytest.approx(samples)
    assert found.tokens == samples * 24
    tokens = weights[:, None] * store.weights(linear).reshape(16, 24)[:samples]
    assert found.rows == pytest.approx(float(tokens.sum()), rel=1e-4)
    oracle = _moment(random_llama.model, linear.name, used.tokens, tokens)
    torch.testing.assert_close(
        found.second_moment.double(), oracle, rtol=1e-3, atol=1e-4 * float(oracle.max())
    )


def test_the_given_mix_is_the_whole_text(random_llama, store, drawn, tmp_path):
    plain = replace(drawn, sources=())
    whole = open_store(random_llama, plain, root=tmp_path / "other")
    collect_statistics(random_llama, plain, whole)
    linear = random_llama.linears[-1]
    ours, theirs = store.layer(linear, 8), whole.layer(linear, 8)
    scale = float(theirs.second_moment.max())
    torch.testing.assert_close(
        ours.second_moment, theirs.second_moment, rtol=1e-4, atol=1e-5 * scale
    )
    torch.testing.assert_close(ours.absolute_maximum, theirs.absolute_maximum)
    assert ours.rows == pytest.approx(theirs.rows, rel=1e-5)
    assert (ours.tokens, ours.gradient_tokens) == (theirs.tokens, theirs.gradient_tokens)


def test_no_sequence_is_run_twice(random_llama, drawn, monkeypatch):
    run = []
    plain = sources.collect_statistics
    monkeypatch.setattr(
        sources, "collect_statistics",
        lambda loaded, part, *a, **k: (run.append(part.sequences), plain(loaded, part, *a, **k)),
    )  # fmt: skip
    found = open_statistics(random_llama, drawn)
    collect(random_llama, drawn, found)
    book = ScoreBook(random_llama, found, found.work_folder / "scores")
    for mix in mixes(drawn):
        settings = replace(SETTINGS, calibration_mix=mix)
        book.scores([SCHEME], settings, 16)
        realise(random_llama, {random_llama.linears[0].name: SCHEME}, settings, found)
    assert sum(run) == drawn.sequences


def test_mixes_are_scored_on_the_given_one_and_give_codes_of_their_own(random_llama, store):
    book = ScoreBook(random_llama, store, store.work_folder / "scores")
    names = [linear.name for linear in random_llama.linears]
    totals, codes = {}, {}
    for mix in ("given", "only a", "only b"):
        settings = replace(SETTINGS, calibration_mix=mix)
        scores = book.scores([SCHEME], settings, None)[SCHEME]
        totals[mix] = sum(scores[name].kl for name in names)
        realised = realise(random_llama, {names[0]: SCHEME}, settings, store)
        codes[mix] = realised.weights[names[0]].codes
    assert totals["given"] < totals["only b"], "a quarter of the text stands for it worse"
    assert len(set(totals.values())) == 3
    assert not torch.equal(codes["only a"], codes["only b"])


def test_sequential_codes_take_the_mix(random_llama, store, drawn):
    assignment = {linear.name: SCHEME for linear in random_llama.linears}
    sequential = replace(SETTINGS, sequential=True, calibration_mix="only b")
    found = realise(random_llama, assignment, sequential, store, calibration=drawn)
    only = drawn.of_source("b")
    alone = open_statistics(random_llama, only)
    collect(random_llama, only, alone)
    same = realise(
        random_llama, assignment, replace(SETTINGS, sequential=True), alone, calibration=only
    )
    for name in assignment:
        assert torch.equal(found.weights[name].codes, same.weights[name].codes), name


def test_which_mixes_are_tried():
    assert mixes(_sequences(["a"] * 16)) == ("given",)
    assert mixes(_sequences(["a", "b"] * 8)) == ("given", "only a", "only b")
    assert mixes(_sequences(["a", "a", "b", "a"] * 4)) == ("given", "equal", "only a", "only b")
    late = _sequences(["a"] * 12 + ["b"] * 4)
    assert mixes(late) == ("given", "equal", "only a"), "b is missing in the first 8"


def test_unknown_mixes(random_llama, store, drawn):
    with pytest.raises(InputError, match="the sources a, b, but got 'only c'"):
        of_mix(store, "only c")
    with pytest.raises(InputError, match="one alone"):
        of_mix(store.stores["a"], "equal")
    with pytest.raises(InputError, match="kept for 8, 16 samples"):
        store.layer(random_llama.linears[0], 5)
