from __future__ import annotations

import numpy as np
import pytest
import torch

from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import AdvisorError
from advisor.evaluation import logits
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model


@pytest.fixture(scope="module")
def sequences():
    tokens = torch.randint(0, 300, (5, 20), generator=torch.Generator().manual_seed(1))
    return TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens))


@pytest.fixture(scope="module")
def reference(random_llama, sequences, tmp_path_factory):
    return Reference.compute(random_llama, sequences, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def perturbed(random_llama):
    name = random_llama.linears[5].name
    weight = random_llama.model.get_submodule(name).weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    return {name: weight + 0.5 * weight.std() * noise}


def test_an_unchanged_model_has_no_divergence(random_llama, reference):
    result = measure(random_llama.model, reference)
    assert 0 <= result.kl.value < 1e-6
    np.testing.assert_allclose(result.sequence_nll, result.sequence_reference_nll, rtol=1e-12)
    assert result.loss.value == result.loss.low == result.loss.high == 0.0
    assert result.top1.value > 0.98  # float16 may tie the two likeliest tokens


def test_a_known_perturbation_by_hand(random_llama, sequences, reference, perturbed):
    def chances():
        with torch.no_grad():
            return random_llama.model(sequences.tokens).logits[:, :-1].double().log_softmax(-1)

    before = chances()
    with quantized_model(random_llama.model, perturbed) as model:
        result = measure(model, reference)
        after = chances()
    kl = (before.exp() * (before - after)).sum(-1).mean(1)
    labels = sequences.tokens[:, 1:, None]
    nll = -after.gather(2, labels)[..., 0].mean(1)
    base = -before.gather(2, labels)[..., 0].mean(1)
    assert float(kl.mean()) > 1e-3
    np.testing.assert_allclose(result.sequence_kl, kl, rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(result.sequence_nll, nll, rtol=1e-5)
    np.testing.assert_allclose(reference.nll, base, rtol=1e-5)
    agreement = (before.argmax(-1) == after.argmax(-1)).double().mean(1)
    np.testing.assert_allclose(result.sequence_agreement, agreement, atol=0.06)
    expected = float((nll - base).mean().expm1())
    assert result.loss.value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert result.loss.low < result.loss.value < result.loss.high
    assert result.perplexity == pytest.approx(float(nll.mean().exp()), rel=1e-5)


def test_chunks_do_not_matter(random_llama, reference, perturbed, monkeypatch):
    with quantized_model(random_llama.model, perturbed) as model:
        whole = measure(model, reference)
        monkeypatch.setattr(logits, "head_tokens", lambda *_: 3)
        chunked = measure(model, reference)
    np.testing.assert_allclose(whole.sequence_kl, chunked.sequence_kl, rtol=1e-5)


def test_stopping_early_keeps_what_was_measured(random_llama, reference):
    seen = []
    result = measure(
        random_llama.model, reference, stop=lambda partial: partial.sequences == 2,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    assert result.sequences == 2
    # Two blocks and the head are a third of a sequence each: two blocks of five sequences, then
    # the head of one, as the second one stopped it.
    assert seen == [(1, 5), (3, 5), (3, 5)]
    assert len(result.sequence_reference_nll) == 2


def test_a_reference_is_computed_once(random_llama, sequences, reference):
    def refuse(done, total):
        raise AssertionError

    root = reference.folder.parents[1]
    again = Reference.compute(random_llama, sequences, root, progress=refuse)
    assert again.folder == reference.folder
    np.testing.assert_array_equal(again.nll, reference.nll)
    other = Reference.compute(random_llama, sequences.first(2), root)
    assert other.folder != reference.folder


def test_the_first_sequences_alone(random_llama, reference, perturbed):
    with quantized_model(random_llama.model, perturbed) as model:
        few = measure(model, reference.first(2))
        all_of_them = measure(model, reference)
    np.testing.assert_array_equal(few.sequence_kl, all_of_them.sequence_kl[:2])


def test_a_damaged_reference_is_refused(random_llama, sequences, tmp_path):
    reference = Reference.compute(random_llama, sequences, tmp_path)
    path = reference.folder / "log_probabilities.f16"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdvisorError, match=r"damaged.*Delete"):
        measure(random_llama.model, Reference.compute(random_llama, sequences, tmp_path))
    path.write_bytes(data[:100])
    with pytest.raises(AdvisorError, match="damaged"):
        measure(random_llama.model, reference)


def test_overflow_is_an_error(random_llama, reference):
    linear = random_llama.linears[0]
    weight = torch.full((linear.out_features, linear.in_features), float("inf"))
    with (
        quantized_model(random_llama.model, {linear.name: weight}) as model,
        pytest.raises(AdvisorError, match="not finite"),
    ):
        measure(model, reference)
