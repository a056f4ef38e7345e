from __future__ import annotations

import pytest
import torch

from advisor.numerics.affine import (
    affine_grid,
    dequantize_affine,
    grid_levels,
    quantize_affine,
)


def keep(scales):
    return scales


def to_bfloat16(scales):
    return scales.to(torch.bfloat16).to(torch.float32)


def test_symmetric_scale_spans_twice_the_largest_magnitude():
    scale, zero = affine_grid(
        torch.tensor([-3.0]), torch.tensor([1.5]), grid_levels(4), symmetric=True, round_scales=keep
    )
    assert scale.item() == pytest.approx(6.0 / 15.0)
    assert zero.item() == 8.0


def test_symmetric_end_points_are_half_a_step_off_and_clamped():
    values = torch.tensor([-7.5, 7.5, 7.4, -7.6, 0.5, 1.5])
    codes = quantize_affine(values, torch.tensor(1.0), torch.tensor(8.0), grid_levels(4))
    # -7.5 rounds to the even -8, 7.5 to 8, which is clamped to 7; 0.5 to 0; 1.5 to 2.
    assert (codes - 8).tolist() == [-8.0, 7.0, 7.0, -8.0, 0.0, 2.0]


def test_asymmetric_grid_holds_zero_even_if_the_range_does_not():
    scale, zero = affine_grid(
        torch.tensor([2.0, -4.0]),
        torch.tensor([5.0, -1.0]),
        grid_levels(2),
        symmetric=False,
        round_scales=keep,
    )
    assert scale.tolist() == pytest.approx([5.0 / 3.0, 4.0 / 3.0])
    assert zero.tolist() == [0.0, 3.0]
    codes = quantize_affine(torch.zeros(2), scale, zero, grid_levels(2))
    assert dequantize_affine(codes, scale, zero).tolist() == [0.0, 0.0]


def test_zero_point_is_chosen_with_the_rounded_scale():
    low, high = torch.tensor([-1.0]), torch.tensor([0.007])
    exact = affine_grid(low, high, grid_levels(8), symmetric=False, round_scales=keep)
    stored = affine_grid(low, high, grid_levels(8), symmetric=False, round_scales=to_bfloat16)
    assert stored[0].item() == to_bfloat16(exact[0]).item()
    assert stored[1].item() == torch.round(1.0 / stored[0]).clamp(max=255).item()


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_groups_get_scale_one(symmetric):
    zeros = torch.zeros(3)
    scale, _ = affine_grid(
        zeros, zeros, grid_levels(4), symmetric=symmetric, round_scales=to_bfloat16
    )
    assert scale.tolist() == [1.0, 1.0, 1.0]


def test_scale_that_underflows_in_float16_does_not_divide_by_zero():
    tiny = torch.tensor([1e-9])
    scale, zero = affine_grid(
        -tiny, tiny, grid_levels(4), symmetric=True, round_scales=lambda s: s.half().float()
    )
    codes = quantize_affine(tiny, scale, zero, grid_levels(4))
    assert dequantize_affine(codes, scale, zero).item() == 0.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step_inside_the_range(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    values = torch.randn(50, 40, generator=generator)
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    levels = grid_levels(bits)
    scale, zero = affine_grid(low, high, levels, symmetric=symmetric, round_scales=keep)
    codes = quantize_affine(values, scale, zero, levels)
    error = (dequantize_affine(codes, scale, zero) - values).abs()
    # A rounded zero point shifts the asymmetric grid by up to half a step more.
    allowed = 0.5 if symmetric else 1.0
    assert bool((error <= allowed * scale * (1 + 1e-4)).all())
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
