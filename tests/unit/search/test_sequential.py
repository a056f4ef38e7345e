"""Sequential codes: their inputs against hooks on a whole model, their target against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.statistics import LayerStatistics
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.errors import InputError
from advisor.evaluation.runtime import quantized_model
from advisor.methods.awq import search_scales
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.prefix_inputs import PrefixInputs
from advisor.search.realise import realise
from advisor.search.sequential import QuantizedPrefix, can_be_sequential

SETTINGS = QuantizationSettings(sequential=True)
INT3 = parse_scheme("gptq-int3-g32-sym")


@pytest.fixture(scope="module")
def sequences():
    tokens = torch.randint(2, 300, (12, 32), generator=torch.Generator().manual_seed(0))
    return TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))


@pytest.fixture
def store(random_llama, sequences, tmp_path):
    found = open_store(random_llama, sequences, root=tmp_path)
    collect_statistics(random_llama, sequences, found)
    return found


def _inputs(model, name, tokens):
    """Return what a linear reads in a run of the whole model, float64 [tokens, in]."""
    rows = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: rows.append(arguments[0].detach().double().flatten(0, 1))
    )
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return torch.cat(rows)


@pytest.mark.parametrize("reader", ["self_attn.q_proj", "mlp.down_proj"])
def test_second_block_reads_what_the_quantized_first_gives(
    random_llama, sequences, tmp_path, reader
):
    """The second block's own weights stay 16-bit while its inputs are summed."""
    linears = {linear.name: linear for linear in random_llama.linears}
    first = {name: INT3 for name in linears if ".layers.0." in name}
    made = realise(random_llama, first, QuantizationSettings(), _complete(random_llama, sequences,
                                                                         tmp_path))  # fmt: skip
    prefix = QuantizedPrefix(random_llama, sequences.tokens, tmp_path, SETTINGS)
    name = f"model.layers.1.{reader}"
    found = prefix.inputs(linears[name], made.weights)
    exact = _inputs(random_llama.model, name, sequences.tokens)
    with quantized_model(random_llama.model, made.weights) as model:
        behind = _inputs(model, name, sequences.tokens)
    assert (exact - behind).norm() > 0.02 * exact.norm(), "else the test could not fail"
    torch.testing.assert_close(
        found.statistics.second_moment.double(), behind.T @ behind, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        found.statistics.absolute_maximum.double(), behind.abs().amax(0), rtol=1e-4, atol=1e-4
    )
    assert found.statistics.tokens == sequences.tokens.numel()
    weight = random_llama.model.get_submodule(name).weight.detach()
    oracle = _oracle(weight, exact, behind, SETTINGS.correction, SETTINGS.correction_damping)
    torch.testing.assert_close(
        found.target(weight, SETTINGS.correction).double(), oracle, rtol=1e-3, atol=1e-4
    )


def _complete(loaded, sequences, folder):
    found = open_store(loaded, sequences, root=folder)
    collect_statistics(loaded, sequences, found)
    return found


def _oracle(weight, exact, behind, correction, damping):
    """Damped least squares of W x on x̂, as stacked rows of an ordinary least squares problem."""
    rows = torch.cat([behind, _ridge(behind, damping)])
    wanted = torch.cat([exact, _ridge(behind, damping)]) @ weight.double().T
    moved = torch.linalg.lstsq(rows, wanted).solution.T
    return weight.double() + correction * (moved - weight.double())


def _ridge(behind, damping):
    mean = behind.square().sum(0).mean()
    return (damping * mean).sqrt() * torch.eye(behind.shape[1], dtype=torch.float64)


def test_first_block_is_the_unquantized_models(random_llama, sequences, store, tmp_path):
    linear = random_llama.linears[0]
    prefix = QuantizedPrefix(
        random_llama, sequences.tokens, tmp_path / "states", SETTINGS,
        lambda linear: store.weights(linear).reshape(sequences.tokens.shape),
    )  # fmt: skip
    found = prefix.inputs(linear, {})
    expected = store.layer(linear)
    torch.testing.assert_close(
        found.statistics.second_moment, expected.second_moment,
        rtol=1e-4, atol=1e-5 * float(expected.second_moment.max()),
    )  # fmt: skip
    assert found.statistics.rows == pytest.approx(expected.rows, rel=1e-5)
    torch.testing.assert_close(
        found.statistics.absolute_sum, expected.absolute_sum, rtol=1e-4, atol=1e-3
    )
    weight = random_llama.model.get_submodule(linear.name).weight.detach()
    torch.testing.assert_close(found.target(weight, 1.0), weight, rtol=1e-4, atol=1e-5)
    assert not list((tmp_path / "states").iterdir()), "hidden states stay nowhere"


@pytest.mark.parametrize("correction", [0.0, 0.3, 1.0])
def test_target_against_least_squares(correction):
    """Non-square weight; the quantized inputs are noisy and rotated copies of the exact ones."""
    generator = torch.Generator().manual_seed(3)
    exact = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    mix = torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator)
    behind = exact @ mix.double() + 0.1 * torch.randn(400, 24, generator=generator).double()
    weight = torch.randn(10, 24, generator=generator)
    statistics = LayerStatistics(
        400, (behind.T @ behind).float(), behind.abs().amax(0).float(), behind.abs().sum(0).float()
    )
    found = PrefixInputs(statistics, (exact.T @ behind).float(), 0.05)
    oracle = _oracle(weight, exact, behind, correction, 0.05)
    torch.testing.assert_close(found.target(weight, correction).double(), oracle, rtol=1e-4,
                               atol=1e-4)  # fmt: skip
    before = (exact @ weight.double().T - behind @ weight.double().T).norm()
    after = (
        exact @ weight.double().T - behind @ found.target(weight, correction).double().T
    ).norm()
    assert after < before or correction == 0


def test_sequential_codes_differ_and_repeat(random_llama, sequences, store):
    assignment = {linear.name: INT3 for linear in random_llama.linears}
    plain = realise(random_llama, assignment, QuantizationSettings(), store)
    made = [
        realise(random_llama, assignment, SETTINGS, store, calibration=sequences) for _ in range(2)
    ]
    for name, weight in made[0].weights.items():
        assert torch.equal(weight.codes, made[1].weights[name].codes)
        assert torch.equal(weight.scales, made[1].weights[name].scales)
    later = [name for name in assignment if ".layers.1." in name]
    assert any(not torch.equal(plain.weights[n].codes, made[0].weights[n].codes) for n in later)


def test_sequential_lowers_the_error_of_the_hidden_states_it_is_fitted_to(
    random_llama, sequences, store
):
    assignment = {linear.name: INT3 for linear in random_llama.linears}
    errors = []
    for settings in (QuantizationSettings(), SETTINGS):
        made = realise(random_llama, assignment, settings, store, calibration=sequences)
        with torch.no_grad():
            expected = random_llama.model.model(sequences.tokens).last_hidden_state
            with quantized_model(random_llama.model, made.weights) as model:
                errors.append(float((model.model(sequences.tokens)[0] - expected).norm()))
    assert errors[1] < errors[0]


def test_what_cannot_be_sequential(random_llama, sequences, store):
    names = [linear.name for linear in random_llama.linears]
    awq = dict.fromkeys(names, parse_scheme("awq-int4-g32-sym"))
    assert can_be_sequential(awq), "its scales are found anew"
    assert not can_be_sequential(dict.fromkeys(names, parse_scheme("rtn-int4-g32-sym")))
    assert can_be_sequential(dict.fromkeys(names, INT3))
    smooth = dict.fromkeys(names, parse_scheme("smoothquant-int8-gch-sym-aint8"))
    assert not can_be_sequential(smooth)
    with pytest.raises(InputError, match="smoothquant in none"):
        realise(random_llama, smooth, SETTINGS, store, calibration=sequences)
    with pytest.raises(InputError, match="needs the calibration text"):
        realise(random_llama, dict.fromkeys(names, INT3), SETTINGS, store)


def _logits(loaded, made, tokens):
    with quantized_model(loaded.model, made.weights, made.replaced) as model, torch.no_grad():
        return model(tokens).logits.double()


def test_awq_scales_are_found_behind_the_quantized_blocks(random_llama, sequences, store):
    """Without correction the first block is as before; the second has other scales and codes."""
    awq = {linear.name: parse_scheme("awq-int3-g32-sym") for linear in random_llama.linears}
    settings = replace(SETTINGS, correction=0.0)
    plain = realise(random_llama, awq, QuantizationSettings(), store)
    made = realise(random_llama, awq, settings, store, calibration=sequences)
    for name in awq:
        same = (made.weights[name].codes == plain.weights[name].codes).double().mean()
        unscaled = name.endswith("o_proj")  # grouped queries: its scales fold into nothing
        assert (same > 0.999) == (".layers.0." in name or unscaled), name
    norm = "model.layers.{}.post_attention_layernorm.weight"
    assert torch.equal(made.replaced[norm.format(0)], plain.replaced[norm.format(0)])
    assert made.replaced.keys() == plain.replaced.keys()
    linear = next(m for m in random_llama.linears if m.name == "model.layers.1.mlp.gate_proj")
    behind = {name: w for name, w in made.weights.items() if ".layers.0." in name}
    rows = {n: t for n, t in made.replaced.items() if ".layers.0." in n}
    with quantized_model(random_llama.model, behind, rows) as model:
        inputs = _inputs(model, linear.name, sequences.tokens)
    weights = store.weights(linear).double()
    statistics = LayerStatistics(
        len(inputs), (inputs.T @ (weights[:, None] * inputs)).float(),
        inputs.abs().amax(0).float(), inputs.abs().sum(0).float(),
    )  # fmt: skip
    pair = [random_llama.model.get_submodule(f"model.layers.1.mlp.{n}_proj").weight.detach()
            for n in ("gate", "up")]  # fmt: skip
    scales = search_scales(pair, statistics, parse_scheme("awq-int3-g32-sym"), settings)
    stored = random_llama.model.get_parameter(norm.format(1)) / made.replaced[norm.format(1)]
    torch.testing.assert_close(stored.detach(), scales, rtol=2e-2, atol=0)


def test_folded_scales_keep_the_function_of_sequential_codes(random_llama, sequences, store):
    """In 8 bits nearly nothing is lost, whatever was folded into what."""
    awq = {linear.name: parse_scheme("awq-int8-g32-asym") for linear in random_llama.linears}
    made = realise(random_llama, awq, SETTINGS, store, calibration=sequences)
    with torch.no_grad():
        exact = random_llama.model(sequences.tokens[:2]).logits.double()
    assert (_logits(random_llama, made, sequences.tokens[:2]) - exact).norm() < 0.02 * exact.norm()


def test_gguf_blocks_take_the_importance_of_the_prefix(random_llama, sequences, store):
    gguf = {linear.name: parse_scheme("gguf-q4_0") for linear in random_llama.linears}
    settings = replace(SETTINGS, correction=0.0)
    plain = realise(random_llama, gguf, QuantizationSettings(), store)
    made = realise(random_llama, gguf, settings, store, calibration=sequences)
    same = {
        name: float((made.weights[name].codes == plain.weights[name].codes).double().mean())
        for name in gguf
    }
    assert all(share > 0.999 for name, share in same.items() if ".layers.0." in name)
    assert min(share for name, share in same.items() if ".layers.1." in name) < 0.99
