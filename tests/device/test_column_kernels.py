"""Columns in turn: the kernels of GPUs against float64, and the methods that use them."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.methods import column_loop, columns_in_turn, descent_steps, registry
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


def group(columns, rows, values):
    draws = torch.Generator().manual_seed(7)
    moment = torch.randn(columns, 3 * columns, generator=draws)
    moment = moment @ moment.t() / columns
    scale = (torch.rand(rows, generator=draws) + 0.5) / 100
    low, high = torch.zeros(rows), torch.full((rows,), 15.0)
    steps = torch.randint(0, 15, (columns, rows), generator=draws)
    steps = steps.float() if values is None else values[steps]
    steps[:, 0] = 0  # says nothing of its scale
    weight = steps * scale + 0.01 * torch.randn(columns, rows, generator=draws)
    shares = moment / moment.diagonal().unsqueeze(1)
    distance = shares @ (weight - steps * scale)
    return weight, steps, scale, low, high, shares, moment.diagonal().contiguous(), distance


@pytest.mark.parametrize(("columns", "rows"), [(16, 5), (32, 40), (72, 33), (128, 16)])
@pytest.mark.parametrize("values", [None, E2M1])
def test_a_visit_is_the_oracle(kernels, columns, rows, values):
    module, device = kernels
    results = []
    for code, where in ((column_block, "cpu"), (module, device)):
        weight, steps, scale, low, high, shares, diagonal, distance = (
            part.to(where) for part in group(columns, rows, values)
        )
        products, best = torch.full_like(distance, torch.nan), torch.zeros_like(scale)
        code.best_scales(distance, steps, scale, shares, diagonal, (products, best))
        rounded = best.to(torch.float16).float()
        error = torch.full_like(weight, torch.nan)
        table = None if values is None else values.to(where)
        code.visit(distance, products, (weight, error, steps, scale, low, high), (best, rounded),
                   shares, table)  # fmt: skip
        results.append([part.cpu() for part in (best, scale, steps, error)])
    (best, scale, steps, error), found = results
    assert torch.allclose(best, found[0], rtol=1e-4, equal_nan=True)
    assert torch.isnan(best[0])
    assert torch.allclose(scale, found[1], rtol=2e-3)  # a rounding of float16 at most
    same = (scale == found[1]) & (steps == found[2]).all(0)
    assert same.float().mean() > 0.9
    assert torch.allclose(error[:, same], found[3][:, same], atol=1e-6)


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
    calls, visits = [], []

    class Counted:
        @staticmethod
        def launch(*given):
            calls.append(given)
            column_block.launch(*given)

        best_scales = staticmethod(column_block.best_scales)

        @staticmethod
        def visit(*given):
            visits.append(given)
            column_block.visit(*given)

    monkeypatch.setattr(columns_in_turn, "_kernels", lambda: Counted)
    for module in (columns_in_turn, descent_steps, column_loop):
        monkeypatch.setattr(module, "has_kernels", lambda _device: True)
    found = registry.quantize(weight, statistics, scheme, settings)
    assert calls or visits
    assert visits or "gch" in name  # whose groups are wider than a kernel takes
    same = (found.codes == expected.codes).float().mean()
    assert same > 0.99
