from __future__ import annotations

import pytest
import torch

from advisor.errors import InputError
from advisor.evaluation.runtime import (
    quantized_model,
    simulate_fp8,
    simulate_int8,
    simulate_llm_int8,
)
from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.schemes import parse_scheme


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 7, 48, generator=generator)
    values[0, 0] = 0.0
    values[..., 3] *= 12.0  # outliers of LLM.int8()
    values[..., 10] *= 4.0
    return values


def int8_weight(weight, scheme):
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round().clamp(-128, 127) + 128
    return QuantizedWeight(parse_scheme(scheme), codes.to(torch.uint8), scales)


def test_int8_by_hand():
    values = torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.4]])
    scale = 127.4 / 127
    codes = torch.tensor([[127.0, 0.0, 1.0, -2.0, -127.0]])
    torch.testing.assert_close(simulate_int8(values), codes * scale)
    # At scale 1, halves go to the even neighbour.
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert simulate_int8(values).tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0]]


def test_a_token_of_zeros_stays_zeros():
    zeros = torch.zeros(2, 8)
    for simulate in (simulate_int8, simulate_fp8, simulate_llm_int8):
        assert torch.equal(simulate(zeros), zeros)


@pytest.mark.parametrize(("kind", "limit"), [("int", 127.0), ("float", 448.0)])
def test_equals_compressed_tensors(inputs, kind, limit):
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

    arguments = QuantizationArgs(
        num_bits=8, type=kind, symmetric=True, strategy=QuantizationStrategy.TOKEN, dynamic=True
    )
    # The scale of vLLM's kernel, which runs the checkpoint; compressed-tensors itself divides
    # int8 by 127.5 when it simulates.
    scale = inputs.abs().amax(-1, keepdim=True) / limit
    scale[scale == 0] = 1.0
    theirs = forward.fake_quantize(inputs, scale, torch.zeros_like(scale), arguments)
    torch.testing.assert_close((simulate_int8 if kind == "int" else simulate_fp8)(inputs), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_llm_int8_equals_bitsandbytes(inputs, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    weight = torch.randn(32, 48)
    layer = bitsandbytes.nn.Linear8bitLt(48, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.half(), requires_grad=False)
    layer = layer.to("cpu").eval()  # in training it multiplies without int8 on a CPU
    theirs = layer(inputs.to(dtype)).float()
    ours_weight = layer.state.CB.float() * layer.state.SCB[:, None] / 127
    ours = simulate_llm_int8(inputs.to(dtype)).float() @ ours_weight.T
    tolerance = 2e-3 if dtype is torch.float32 else 6e-3
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max())


def test_llm_int8_scale_counts_small_values_of_outlier_columns():
    values = torch.tensor([[7.0, 1.0, 1.0], [5.0, 1.0, 1.0]])
    result = simulate_llm_int8(values)
    assert result[:, 0].tolist() == [7.0, 5.0]  # the column has an outlier: kept
    assert result[0, 1] == 1.0
    assert result[1, 1] == pytest.approx(round(127 / 5) * 5 / 127)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_and_hooks_act_inside_and_vanish_outside(random_llama):
    model, linear = random_llama.model, random_llama.linears[3]
    before = state(model)
    tokens = torch.arange(12)[None]
    module = model.get_submodule(linear.name)
    weight = int8_weight(module.weight, "smoothquant-int8-gch-sym-aint8")
    seen = {}
    handle = module.register_forward_hook(
        lambda module, arguments, output: seen.update(
            x=arguments[0], y=output, weight=module.weight.data
        )
    )
    with torch.no_grad(), quantized_model(model, {linear.name: weight}):
        model(tokens)
        assert torch.equal(seen["weight"], weight.dequantize())
        inside = dict(seen)
        model(tokens)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    expected = simulate_int8(seen["x"]) @ weight.dequantize().T
    torch.testing.assert_close(inside["y"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(inside["y"], seen["y"])
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not module._forward_pre_hooks


def test_restored_after_an_exception(random_llama):
    model, linear = random_llama.model, random_llama.linears[0]
    before = state(model)
    norm = "model.norm.weight"

    def explode():
        with quantized_model(
            model,
            {linear.name: torch.zeros(linear.out_features, linear.in_features)},
            {norm: torch.zeros(64), "lm_head.weight": torch.zeros_like(model.lm_head.weight)},
        ):
            model(torch.arange(12)[None])

    seen = []
    embedding = model.model.embed_tokens

    def look(module, arguments):
        seen.append(bool(module.weight.any()))
        raise KeyError

    handle = embedding.register_forward_pre_hook(look)

    with pytest.raises(KeyError):
        explode()
    handle.remove()
    assert seen == [False]  # tied to the head, which was replaced
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_wrong_name_and_shape_is_listed(random_llama):
    before = state(random_llama.model)
    linear = random_llama.linears[0]
    weights = {
        linear.name: torch.zeros(2, 2),
        "model.layers.0.self_attn.q_pro": torch.zeros(2, 2),
    }
    with (
        pytest.raises(InputError, match=r"2 problems(.|\n)*\(2, 2\)(.|\n)*Did you mean"),
        quantized_model(random_llama.model, weights),
    ):
        pass
    after = state(random_llama.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_activations_that_cannot_be_simulated(random_llama):
    linear = random_llama.linears[0]
    weight = int8_weight(random_llama.model.get_submodule(linear.name).weight, "nvfp4-anvfp4")
    with (
        pytest.raises(InputError, match="needs an input_global_scale"),
        quantized_model(random_llama.model, {linear.name: weight}),
    ):
        pass
