"""Experts under rounded inputs: what rounding costs, and mixtures that may hold them."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines.options import mixture_options
from advisor.evaluation.runtime import activation_simulation
from advisor.hardware.catalogue import find_profile
from advisor.models.load import load_model
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search.compose import Composer
from advisor.search.effort import FULL
from advisor.search.families import Family
from advisor.search.input_noise import InputNoise, noise_terms
from advisor.search.scores import ScoreBook

FP8 = parse_scheme("gptq-fp8-gch-afp8")


@pytest.fixture(scope="module")
def moe(tiny, tmp_path_factory):
    """A tiny mixture of experts, its statistics and the tokens that they are of."""
    folder, _ = tiny("olmoe")
    loaded = load_model(folder)
    generator = torch.Generator().manual_seed(3)
    vocabulary = loaded.model.config.vocab_size
    tokens = torch.randint(0, vocabulary, (16, 32), generator=generator)
    calibration = TokenSequences(tokens, "case", "0" * 8, 0, hash_tokens(tokens))
    store = open_store(loaded, calibration, root=tmp_path_factory.mktemp("store"))
    collect_statistics(loaded, calibration, store)
    noise = InputNoise(loaded, store, calibration, tmp_path_factory.mktemp("noise"))
    return folder, loaded, calibration, store, noise


def _routed(loaded, tokens, names):
    """What reaches some linears: one array of rows each."""
    seen = {name: [] for name in names}
    handles = [
        loaded.model.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        loaded.model(tokens)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items() if rows}


@pytest.mark.parametrize("few", [False, True], ids=["own", "pooled"])
def test_an_experts_rounding_errors_are_those_of_the_tokens_routed_to_it(
    moe, few, monkeypatch, tmp_path
):
    _, loaded, calibration, store, _ = moe
    monkeypatch.setattr("advisor.search.input_noise._FEWEST_TOKENS", 10**6 if few else 1)
    noise = InputNoise(loaded, store, calibration, tmp_path)
    linears = [m for m in loaded.linears if m.is_expert and m.block == 1 and "gate" in m.name]
    assert len(linears) == 4
    rows = _routed(loaded, calibration.tokens, [linear.name for linear in linears])
    simulate = activation_simulation(FP8)
    errors = {name: (simulate(x) - x).double().square() for name, x in rows.items()}
    pooled = torch.cat(list(errors.values())).mean(0)
    for linear in linears:
        expected = pooled if few else errors[linear.name].mean(0)
        found = noise.mean_squares(linear, FP8, None)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-12)


def test_mixtures_may_hold_experts_under_rounded_inputs(moe, tmp_path):
    folder, loaded, _, store, noise = moe
    spec = load_modelspec(folder)
    offered = mixture_options("vllm", find_profile("b200"), spec.linears)
    book = ScoreBook(loaded, store, tmp_path, noise=noise)
    composer = Composer(spec, spec.linears, offered, book, FULL.settings)
    groups = composer.groups(Family("gptq", None, static_groups=True))
    experts = {key: options for key, options in groups.items() if "experts" in key}
    assert experts
    for options in experts.values():
        scores = {option.name: option.score for option in options}
        assert scores["nvfp4-anvfp4"] > scores["nvfp4"] > 0
        assert scores["gptq-fp8-gch-afp8"] > 0
        assert scores["nvfp4-anvfp4"] > 5 * scores["gptq-fp8-gch-afp8"]


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_what_rounding_inputs_of_experts_costs_is_predicted(moe, kind):
    """KL of the last block's experts: before it, routers of a random model choose others."""
    _, loaded, calibration, store, noise = moe
    scheme = parse_scheme({"fp8": "rtn-fp8-gch-afp8", "int8": "rtn-int8-gch-sym-aint8"}[kind])
    last = max(linear.block for linear in loaded.linears)
    experts = [linear for linear in loaded.linears if linear.is_expert and linear.block == last]
    simulate = activation_simulation(scheme)
    predicted = sum(
        noise_terms(
            loaded.tensor(f"{linear.name}.weight").float(),
            noise.mean_squares(linear, scheme, None),
            store.layer(linear),
        )[0]
        for linear in experts
    )
    with torch.no_grad():
        before = loaded.model(calibration.tokens).logits.double().log_softmax(-1)
        handles = [
            loaded.model.get_submodule(linear.name).register_forward_pre_hook(
                lambda _, arguments: (simulate(arguments[0]), *arguments[1:])
            )
            for linear in experts
        ]
        after = loaded.model(calibration.tokens).logits.double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=0.2)
