"""Columns in turn: the kernels of GPUs against float64, and the methods that use them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.methods import column_loop, columns_in_turn, descent, registry
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from tests.oracles import column_block

FULL = QuantizationSettings(descent=2, output_feedback=0.7, clip="mse", clip_steps=4)
E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def block(columns=24, batches=3, rows=40):
    draws = torch.Generator().manual_seed(5)
    current = torch.randn(columns, batches, rows, generator=draws)
    scale = (torch.rand(columns, batches, rows, generator=draws) + 0.5) / 4
    zero = torch.randint(0, 16, (columns, batches, rows), generator=draws).float()
    factor = 0.2 * torch.randn(batches, columns, columns, generator=draws)
    return current, (scale, -zero, 15 - zero), factor


@pytest.fixture
def kernels():
    """The kernels on a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter; and the device."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("neither a GPU nor TRITON_INTERPRET=1")
    pytest.importorskip("triton")
    from advisor.methods import column_kernels

    return column_kernels, "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("values", [None, E2M1])
def test_kernel_is_the_oracle(kernels, moves, values):
    module, device = kernels
    current, limits, factor = block()
    origin = torch.round(limits[2] / 2) if moves else None
    if values is not None and moves:
        origin = values[(origin.long() % len(values)).abs()]
    given = (current, origin, limits, factor, values)
    expected = torch.empty_like(current), torch.empty_like(current)
    column_block.launch(*given, expected)
    move = lambda value: None if value is None else value.to(device)  # noqa: E731
    found = [torch.full_like(current, torch.nan).to(device) for _ in range(2)]
    there = tuple(part.to(device) for part in limits)
    module.launch(move(current), move(origin), there, move(factor), move(values), found)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.allclose(found[1].cpu(), expected[1], atol=1e-5)


def problem(rows=40, columns=192):
    draws = torch.Generator().manual_seed(11)
    inputs = torch.randn(300, columns, generator=draws) @ torch.randn(
        columns, columns, generator=draws
    )
    gradients = torch.randn(300, rows, generator=draws) @ torch.randn(rows, rows, generator=draws)
    statistics = LayerStatistics(
        tokens=300, second_moment=inputs.t() @ inputs, absolute_maximum=inputs.abs().amax(0),
        absolute_sum=inputs.abs().sum(0), gradient_tokens=300,
        gradient_moment=gradients.t() @ gradients, moment_weight=280.0,
    )  # fmt: skip
    return 0.05 * torch.randn(rows, columns, generator=draws), statistics


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("feedback", [0.0, 0.7])
@pytest.mark.parametrize("name", ["gptq-int4-g64-sym", "gptq-int3-g32-asym", "gptq-int4-gch-asym",
                                  "nvfp4", "mxfp4", "gptq-int4-g64-sym-actorder"])  # fmt: skip
def test_methods_choose_the_same_codes_with_kernels(monkeypatch, name, feedback, ordered):
    settings = replace(FULL, output_feedback=feedback, static_groups=ordered)
    weight, statistics = problem()
    scheme = parse_scheme(name)
    expected = registry.quantize(weight, statistics, scheme, settings)
    calls = []

    class Counted:
        @staticmethod
        def launch(*given):
            calls.append(given)
            column_block.launch(*given)

    monkeypatch.setattr(columns_in_turn, "_kernels", lambda: Counted)
    for module in (columns_in_turn, descent, column_loop):
        monkeypatch.setattr(module, "has_kernels", lambda _device: True)
    found = registry.quantize(weight, statistics, scheme, settings)
    assert calls
    same = (found.codes == expected.codes).float().mean()
    assert same > 0.99
