"""Scores against their definition, stacking, and realised weights against the model's function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.statistics import LayerStatistics
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.methods.errors import layer_error
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.models.load import load_model
from advisor.schemes import parse_scheme
from advisor.search.realise import realise
from advisor.search.score import score_change
from advisor.search.scores import ScoreBook, module_weight
from advisor.search.stacking import quantize_group

SETTINGS = QuantizationSettings(scale_steps=5)


def _statistics(inputs, outputs, *, full=True):
    generator = torch.Generator().manual_seed(inputs + outputs)
    x = torch.randn(200, inputs, generator=generator)
    g = torch.randn(150, outputs, generator=generator)
    moment = g.T @ g
    return LayerStatistics(
        200, x.T @ x, x.abs().amax(0), x.abs().sum(0), 150, moment if full else moment.diagonal()
    ), x, g  # fmt: skip


def test_rows_of_a_tall_linear_count_by_the_diagonal_of_gradients():
    statistics, x, g = _statistics(4, 6)
    delta = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    effect = (delta.double() @ x.double().T).square().mean(1) * g.double().square().mean(0)
    assert score_change(delta, statistics).kl == pytest.approx(float(effect.sum()) / 2, rel=1e-4)
    wide, x, g = _statistics(6, 4)  # of fewer outputs all of G counts
    whole = ((g.double() @ delta.T.double() @ x.double().T) ** 2).mean()
    assert score_change(delta.T, wide).kl == pytest.approx(float(whole) / 2, rel=1e-4)


def test_score_is_half_the_mean_squared_effect_on_the_loss():
    statistics, x, g = _statistics(6, 4)
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    effect = (g.double() @ delta.double() @ x.double().T) ** 2
    score = score_change(delta, statistics)
    assert score.kl == pytest.approx(float(effect.mean()) / 2, rel=1e-4)
    assert score.error == pytest.approx(float((x @ delta.T).square().sum(1).mean()), rel=1e-4)


def test_diagonal_gradients_score_rows_apart():
    statistics, x, g = _statistics(6, 4, full=False)
    delta = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    rows = (x.double() @ delta.double().T).square().mean(0) * g.double().square().mean(0)
    assert score_change(delta, statistics).kl == pytest.approx(float(rows.sum()) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["rtn-int4-g32-asym", "gptq-int4-g32-sym", "gptq-int3-gch-sym", "gguf-q4_1", "gguf-iq4_nl"],
)
def test_stacked_rows_are_those_of_each_linear_alone(name):
    statistics, _, _ = _statistics(64, 8)
    weights = [
        torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (8, 24)
    ]
    scheme = parse_scheme(name)
    found = quantize_group(weights, statistics, [scheme], SETTINGS, foldable=False)[0]
    for weight, result in zip(weights, found.weights, strict=True):
        alone = quantize(weight, statistics, scheme, SETTINGS)
        assert torch.equal(result.codes, alone.codes)
        assert torch.equal(result.scales, alone.scales)
        assert result.extras.keys() == alone.extras.keys()
        assert all(torch.equal(result.extras[key], alone.extras[key]) for key in alone.extras)


def test_fused_linears_share_what_engines_make_them_share(random_llama, store):
    """One scale for a whole FP8 weight, and one for calibrated inputs: q, k and v are one."""
    scheme = parse_scheme("rtn-fp8-gtensor-afp8-static")
    assignment = {linear.name: scheme for linear in random_llama.linears}
    weights = realise(random_llama, assignment, SETTINGS, store).weights
    groups = {}
    for linear in random_llama.linears:
        found = weights[linear.name]
        pair = float(found.scales), float(found.extras["input_scale"])
        groups.setdefault(linear.input_group, set()).add(pair)
    assert all(len(pairs) == 1 for pairs in groups.values())
    assert len(set.union(*groups.values())) == len(groups) == 8
    largest = float(store.layer(random_llama.linears[0]).absolute_maximum.max())
    first = weights[random_llama.linears[0].name].extras["input_scale"]
    assert float(first) == pytest.approx(largest / 448, rel=2**-8)


def test_hqq_needs_no_statistics_and_is_better_with_them(random_llama, store):
    assignment = {linear.name: parse_scheme("hqq-int4-g32-asym") for linear in random_llama.linears}
    without = realise(random_llama, assignment, SETTINGS, None).weights
    with_them = realise(random_llama, assignment, SETTINGS, store).weights
    for linear in random_llama.linears:
        weight = module_weight(random_llama, linear)
        errors = [
            layer_error(weight, found[linear.name], store.layer(linear))
            for found in (without, with_them)
        ]
        assert errors[1] < 0.9 * errors[0]


def test_awq_folds_without_changing_the_function(random_llama, store):
    """At 8 bits what is left is rounding; a scale folded wrongly would change everything."""
    assignment = {linear.name: parse_scheme("awq-int8-g32-sym") for linear in random_llama.linears}
    realised = realise(random_llama, assignment, SETTINGS, store)
    assert any("layernorm" in name for name in realised.replaced)
    tokens = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = random_llama.model(tokens).logits
        with quantized_model(random_llama.model, realised.weights, realised.replaced) as model:
            found = model(tokens).logits
    assert (found - expected).norm() / expected.norm() < 0.03


def test_smoothquant_moves_outliers_out_of_the_inputs(llama_builder, tmp_path):
    """With a few huge channels, 8-bit inputs lose the small ones unless scales are folded."""
    folder = llama_builder("outliers")
    loaded = load_model(folder)
    with torch.no_grad():
        for block in loaded.model.model.layers:
            for norm, readers in (
                (block.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                (block.post_attention_layernorm, ("gate_proj", "up_proj")),
            ):
                norm.weight[:3] *= 64
                for name in readers:
                    owner = block.self_attn if hasattr(block.self_attn, name) else block.mlp
                    getattr(owner, name).weight[:, :3] /= 64
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    sequences = TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))
    store = open_store(loaded, sequences, root=tmp_path)
    collect_statistics(loaded, sequences, store)
    test = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(9))
    errors = {}
    with torch.no_grad():
        expected = loaded.model(test).logits
        for method in ("rtn", "smoothquant"):
            scheme = parse_scheme(f"{method}-int8-gch-sym-aint8")
            made = realise(loaded, dict.fromkeys((m.name for m in loaded.linears), scheme),
                           SETTINGS, store)  # fmt: skip
            assert bool(made.replaced) is (method == "smoothquant")
            with quantized_model(loaded.model, made.weights, made.replaced) as model:
                errors[method] = float((model(test).logits - expected).norm() / expected.norm())
    assert errors["smoothquant"] < 0.4 * errors["rtn"], errors


def test_smoothquant_and_awq_share_no_input(random_llama, store):
    names = [linear.name for linear in random_llama.linears]
    assignment = dict.fromkeys(names, parse_scheme("smoothquant-int8-gch-sym-aint8"))
    assignment[names[0]] = parse_scheme("awq-int4-g32-sym")
    with pytest.raises(InputError, match="of 3 have it"):
        realise(random_llama, assignment, SETTINGS, store)


def test_awq_needs_all_linears_of_an_input(random_llama, store):
    name = random_llama.linears[0].name
    with pytest.raises(InputError, match="only 1 of 3"):
        realise(random_llama, {name: parse_scheme("awq-int4-g32-sym")}, SETTINGS, store)


def test_all_bad_modules_are_listed(random_llama, store):
    name = random_llama.linears[0].name
    bad = {name: parse_scheme("rtn-int4-g48-sym"), "model.nowhere": parse_scheme("bf16")}
    with pytest.raises(InputError, match=r"(?s)2 problems.*group_size=48.*model.nowhere"):
        realise(random_llama, bad, SETTINGS, store)


def test_scores_come_from_disk_the_second_time(random_llama, store, tmp_path):
    schemes = [parse_scheme(n) for n in ("gptq-int4-g32-sym", "rtn-int8-g32-sym", "bf16")]
    first = ScoreBook(random_llama, store, tmp_path / "scores")
    found = first.scores(schemes, SETTINGS, None)
    second = ScoreBook(random_llama, store, tmp_path / "scores")
    assert second.missing(schemes, SETTINGS, None) == []
    assert second.scores(schemes, SETTINGS, None) == found
    four, eight, none = (found[scheme] for scheme in schemes)
    for linear in random_llama.linears:
        assert four[linear.name].kl > eight[linear.name].kl > none[linear.name].kl == 0


FED = replace(SETTINGS, output_feedback=0.9, descent=1)


@pytest.mark.parametrize("name", ["gptq-int4-g32-asym", "gguf-q4_1"])
def test_each_linear_is_fitted_to_its_own_output_gradients(random_llama, store, name):
    scheme = parse_scheme(name)
    assignment = {linear.name: scheme for linear in random_llama.linears}
    found = realise(random_llama, assignment, FED, store)
    linear = next(one for one in random_llama.linears if one.name.endswith("up_proj"))
    weight = random_llama.tensor(f"{linear.name}.weight").float()
    alone = quantize(weight, store.layer(linear), scheme, FED)
    assert torch.equal(found.weights[linear.name].codes, alone.codes)
    without = realise(random_llama, assignment, replace(FED, output_feedback=0.0), store)
    assert not torch.equal(found.weights[linear.name].codes, without.weights[linear.name].codes)


def test_schemes_that_share_a_scale_are_still_quantized_together(random_llama, store):
    scheme = parse_scheme("gptq-fp8-gtensor-afp8")
    assignment = {linear.name: scheme for linear in random_llama.linears}
    fed = realise(random_llama, assignment, FED, store)
    plain = realise(random_llama, assignment, SETTINGS, store)
    for name, weight in plain.weights.items():
        assert torch.equal(weight.codes, fed.weights[name].codes)
        assert torch.equal(weight.scales, fed.weights[name].scales)


def test_outputs_that_took_up_scales_are_fitted_as_independent(random_llama, store):
    def chosen(name):
        scaled = name.endswith("down_proj")
        return parse_scheme("awq-int4-g32-asym" if scaled else "gptq-int4-g32-asym")

    assignment = {linear.name: chosen(linear.name) for linear in random_llama.linears}
    fed = realise(random_llama, assignment, FED, store)
    plain = realise(random_llama, assignment, replace(FED, output_feedback=0.0), store)
    up = next(linear.name for linear in random_llama.linears if linear.name.endswith("up_proj"))
    gate = up.replace("up_proj", "gate_proj")
    assert torch.equal(fed.weights[up].codes, plain.weights[up].codes)
    assert not torch.equal(fed.weights[gate].codes, plain.weights[gate].codes)
