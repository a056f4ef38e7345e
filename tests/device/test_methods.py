"""Everything that computes on weights and statistics, on another device than the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.methods import registry
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.outer import rows_to_score
from advisor.search.prefix_inputs import PrefixSums
from advisor.search.score import score_change
from advisor.search.stacking import quantize_group

SCHEMES = (
    "rtn-int4-g64-asym", "rtn-int8-gch-sym-aint8", "rtn-fp8-gch", "rtn-fp8-b32-afp8",
    "rtn-fp8-gtensor-afp8-static", "rtn-int4-g64-sym-afp8", "gptq-int4-g64-sym",
    "gptq-int3-g32-asym", "gptq-int4-g64-sym-actorder", "gptq-fp8-b32-afp8",
    "gptq-fp8-gch-afp8-static", "gptq-int4-g64-sym-afp8", "awq-int4-g64-asym",
    "smoothquant-int8-gch-sym-aint8-static", "hqq-int4-g64-asym", "bnb-nf4", "bnb-fp4-dq",
    "llm.int8", "gguf-q4_0", "gguf-q5_1", "gguf-iq4_nl", "gguf-q3_k", "gguf-q4_k", "mxfp4",
    "mxfp8-amxfp8", "nvfp4-anvfp4",
)  # fmt: skip
FULL = QuantizationSettings(
    static_groups=True, descent=2, output_feedback=0.7, clip="mse", clip_steps=4
)


def problem(rows=48, columns=256):
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(300, columns, generator=generator)
    gradients = torch.randn(300, rows, generator=generator) @ torch.randn(
        rows, rows, generator=generator
    )
    statistics = LayerStatistics(
        tokens=300,
        second_moment=inputs.t() @ inputs,
        absolute_maximum=inputs.abs().amax(0),
        absolute_sum=inputs.abs().sum(0),
        gradient_tokens=300,
        gradient_moment=gradients.t() @ gradients,
        moment_weight=280.0,
    )
    return 0.05 * torch.randn(rows, columns, generator=generator), statistics


def moved(statistics, device):
    return replace(
        statistics,
        second_moment=statistics.second_moment.to(device),
        absolute_maximum=statistics.absolute_maximum.to(device),
        absolute_sum=statistics.absolute_sum.to(device),
        gradient_moment=statistics.gradient_moment.to(device),
    )


def check_equal(there, here):
    """The same weight, each where it was made; on the CPU both are equal to the bit."""
    assert there.codes.is_cuda
    assert there.scales.is_cuda
    back = there.to("cpu")
    for name in ("codes", "scales", "zero_points", "group_index", "codebook"):
        ours, theirs = getattr(back, name), getattr(here, name)
        assert (ours is None) == (theirs is None)
        assert ours is None or (ours.is_cpu and torch.equal(ours, theirs))
    assert back.extras.keys() == here.extras.keys()
    assert all(torch.equal(back.extras[name], here.extras[name]) for name in here.extras)
    assert torch.equal(there.to("cuda:0").dequantize().cpu(), here.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("settings", [QuantizationSettings(), FULL], ids=["plain", "full"])
def test_every_method_computes_where_the_weight_is(simulated, name, settings):
    weight, statistics = problem()
    scheme = parse_scheme(name)
    here = registry.quantize(weight, statistics, scheme, settings)
    there = registry.quantize(weight.to("cuda:0"), moved(statistics, "cuda:0"), scheme, settings)
    check_equal(there, here)


def test_groups_share_scales_there(simulated):
    weights, statistics = list(problem()[0].split(16)), problem()[1]
    schemes = [parse_scheme(name) for name in ("awq-int4-g64-asym", "gptq-int4-g32-sym")]
    options = {"foldable": True, "share_scales": True}
    here = quantize_group(weights, statistics, schemes, QuantizationSettings(), **options)
    there = quantize_group(
        [weight.to("cuda:0") for weight in weights], moved(statistics, "cuda:0"), schemes,
        QuantizationSettings(), **options,
    )  # fmt: skip
    for ours, theirs in zip(there, here, strict=True):
        for index in range(3):
            check_equal(ours.weights[index], theirs.weights[index])
            assert torch.equal(ours.dequantize(index).cpu(), theirs.dequantize(index))


def test_scores_are_numbers_of_the_host(simulated):
    weight, statistics = problem()
    delta = 0.01 * weight.roll(1, 0)
    there = score_change(delta.to("cuda:0"), moved(statistics, "cuda:0"))
    assert there == score_change(delta, statistics)
    chosen, factors = rows_to_score(torch.arange(50.0, device="cuda:0"), 10)
    assert chosen.is_cuda
    assert factors.is_cuda
    assert chosen.tolist() == rows_to_score(torch.arange(50.0), 10)[0].tolist()


def test_weights_are_fitted_to_quantized_inputs_there(simulated):
    weight, _ = problem(rows=24, columns=32)
    exact = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    quantized = exact + 0.05 * exact.roll(1, 1)
    targets = []
    for device in ("cpu", "cuda:0"):
        sums = PrefixSums(32, torch.device(device))
        sums.add(exact.to(device), quantized.to(device), torch.ones(200, device=device))
        found = sums.finish(0.1)
        assert found.statistics.second_moment.device == torch.device(device)
        targets.append(found.target(weight.to(device), 0.3))
    assert targets[1].is_cuda
    assert torch.equal(targets[1].cpu(), targets[0])
