"""Statistics of embedding and head against explicit sums, and what their scores predict."""

from __future__ import annotations

import copy

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.fisher import sign_source
from advisor.calibration.merging import collect_part, merge_parts
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.models.inspect import find_outer, outer_specs
from advisor.models.load import load_model
from advisor.search.outer_codes import fitting_statistics, role_statistics
from advisor.search.score import score_change
from tests.oracles.reference_fisher import sent_back

PREFIXES = [4, 8]


@pytest.fixture(scope="module", params=["untied", "tied"])
def loaded(request, tmp_path_factory, random_llama_folder):
    if request.param == "tied":
        return load_model(random_llama_folder)
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "conftest.py"
    spec = importlib.util.spec_from_file_location("root_conftest", path)
    root = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(root)
    folder = tmp_path_factory.mktemp("untied") / "llama"
    return load_model(root.build_llama(folder, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def sequences():
    tokens = torch.randint(2, 40, (16, 24), generator=torch.Generator().manual_seed(3))
    return TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens))


@pytest.fixture(scope="module")
def store(loaded, sequences, tmp_path_factory):
    store = open_store(loaded, sequences, root=tmp_path_factory.mktemp("store"), prefixes=PREFIXES)
    collect_statistics(loaded, sequences, store, prefixes=PREFIXES)
    return store


@pytest.fixture(scope="module")
def truth(loaded, sequences):
    """What the head reads, the gradients at its output and at the embeddings, in float64."""
    model = copy.deepcopy(loaded.model).double()
    reads, behind, embedded = [], [], []
    seen = {}
    model.get_output_embeddings().register_forward_hook(
        lambda module, arguments, output: seen.update(read=arguments[0], out=output)
    )

    def remember(module, arguments, output):
        output = output.detach().requires_grad_(True)
        seen["embedded"] = output
        return output

    model.get_input_embeddings().register_forward_hook(remember)
    for tokens in sequences.tokens:
        logits = model(tokens[None]).logits[0]
        seen["out"].retain_grad()
        logits.backward(sent_back(logits.detach(), sign_source(tokens, 0)))
        reads.append(seen["read"][0].detach())
        behind.append(seen["out"].grad[0])
        embedded.append(seen["embedded"].grad[0])
    return reads, behind, embedded


def close(found, expected):
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


@pytest.mark.parametrize("samples", [4, 8, 16])
def test_the_heads_sums(loaded, store, truth, samples):
    reads, behind, _ = truth
    found = store.layer(outer_specs(loaded.model)[0], samples)
    rows, gradients = torch.cat(reads[:samples]), torch.cat(behind[:samples])
    weights = gradients.square().sum(1)
    assert found.tokens == samples * 24
    close(found.second_moment, (rows * weights[:, None]).T @ rows)
    assert found.rows == pytest.approx(float(weights.sum()), rel=1e-4)
    # The gradients' diagonal is that of all samples: it serves scores.
    close(found.gradient_moment, torch.cat(behind).square().sum(0))
    close(found.absolute_maximum, rows.abs().amax(0))
    close(found.absolute_sum, rows.abs().sum(0))


@pytest.mark.parametrize("samples", [4, 16])
def test_the_embeddings_sums(loaded, store, sequences, truth, samples):
    _, _, embedded = truth
    found = store.layer(outer_specs(loaded.model)[1], samples)
    gradients = torch.cat(embedded[:samples])
    close(found.second_moment, gradients.T @ gradients)
    assert found.rows == samples * 24
    shares = torch.zeros(len(found.gradient_moment), dtype=torch.float64)
    for token, gradient in zip(sequences.tokens.flatten(), torch.cat(embedded), strict=True):
        shares[token] += gradient.square().sum()
    close(found.gradient_moment, shares)


def test_parts_merge_to_the_whole(loaded, sequences, store, tmp_path):
    for start, stop in ((0, 8), (8, 16)):
        collect_part(loaded, sequences, start, stop, root=tmp_path, prefixes=PREFIXES)
    merged = merge_parts(loaded, sequences, [8], root=tmp_path, prefixes=PREFIXES)
    for spec in outer_specs(loaded.model):
        for samples in (8, 16):
            found, expected = merged.layer(spec, samples), store.layer(spec, samples)
            close(found.second_moment, expected.second_moment.double())
            close(found.gradient_moment, expected.gradient_moment.double())
            assert found.rows == pytest.approx(expected.rows, rel=1e-4)


def quadratic(delta, parts):
    """½ Σ_t c_t ΔE_t S ΔE_tᵀ, one row at a time: the textbook form of the score."""
    total = 0.0
    for part in parts:
        mean = part.second_moment.double() / part.rows
        for row, count in zip(delta.double(), part.gradient_moment.double(), strict=True):
            total += 0.5 * float(count) / part.gradient_tokens * float(row @ mean @ row)
    return total


def test_scores_are_the_sum_of_the_roles_rows(loaded, store):
    generator = torch.Generator().manual_seed(5)
    for module in find_outer(loaded.model):
        parts = role_statistics(loaded, store, module)
        assert len(parts) == (2 if module.tied else 1)
        shape = (module.linear.out_features, module.linear.in_features)
        delta = 0.01 * torch.randn(shape, generator=generator)
        found = sum(score_change(delta, part).kl for part in parts)
        assert found == pytest.approx(quadratic(delta, parts), rel=1e-4)


def test_codes_are_fitted_to_what_counts_in_the_score(loaded, store):
    """The fitted moment is the score's curvature, averaged over rows."""
    for module in find_outer(loaded.model):
        parts = role_statistics(loaded, store, module)
        fitted = fitting_statistics(parts)
        curvature = sum(
            part.second_moment.double() / part.rows
            * float(part.gradient_moment.sum()) / part.gradient_tokens
            for part in parts
        )  # fmt: skip
        ratio = fitted.second_moment.double().diagonal() / curvature.diagonal()
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-3, atol=0)


def test_scores_predict_the_kl_of_a_small_change(loaded, store, sequences):
    """Of isotropic noise the partial traces say all but what repeated tokens do together."""
    model = copy.deepcopy(loaded.model).double()
    with torch.no_grad():
        before = model(sequences.tokens).logits.log_softmax(-1)
    for module in find_outer(loaded.model):
        weight = model.get_parameter(f"{module.name}.weight")
        ratios = []
        for seed in range(4):
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            noise = noise.double() * 0.01 * weight.std()
            with torch.no_grad():
                weight += noise
                after = model(sequences.tokens).logits.log_softmax(-1)
                weight -= noise
            measured = float((before.exp() * (before - after)).sum(-1).mean())
            parts = role_statistics(loaded, store, module)
            ratios.append(measured / sum(score_change(noise.float(), p).kl for p in parts))
        mean = sum(ratios) / len(ratios)
        assert 0.6 < mean < 1.6, (module.name, ratios)
