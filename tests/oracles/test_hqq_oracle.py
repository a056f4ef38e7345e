"""HQQ against its textbook twin, and against the authors' library where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
import quantizer_cases as cases
import reference_hqq as oracle
import torch
from quantizer_cases import FLOAT32, double

from advisor.errors import InputError
from advisor.formats.registry import get_format
from advisor.methods.errors import layer_error
from advisor.methods.registry import quantize
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme


@pytest.fixture(scope="module")
def weight():
    """Four groups of 64 to a row and outliers, so that the mean is not the middle."""
    generator = torch.Generator().manual_seed(4)
    values = 0.03 * torch.randn(24, 256, generator=generator)
    values[torch.rand(values.shape, generator=generator) < 0.02] *= 6
    return values


@pytest.mark.parametrize("name", ["hqq-int4-g64-asym", "hqq-int3-g64-asym", "hqq-int2-g32-asym"])
def test_zero_points_are_those_of_the_solver(weight, name):
    scheme = parse_scheme(name)
    found = quantize(weight, None, scheme, FLOAT32)
    width, levels = int(scheme.group_size), 2 ** int(scheme.bits) - 1
    groups = double(weight).reshape(24, -1, width)
    moved = 0
    for row, group in np.ndindex(groups.shape[:2]):
        scale, iterates = oracle.zero_points(groups[row, group].tolist(), levels)
        assert float(found.scales[row, group]) == pytest.approx(scale, rel=1e-6)
        least = min(error for _, error in iterates)
        zero = float(found.zero_points[row, group])
        ours = double(found.dequantize()).reshape(groups.shape)[row, group]
        assert np.square(ours - groups[row, group]).mean() == pytest.approx(least, rel=5e-4)
        # Two iterates may be as good as each other: the zero point is one of those.
        near = [z for z, error in iterates if error <= least * (1 + 5e-4)]
        assert min(abs(zero - candidate) for candidate in near) < 2e-3
        codes = found.codes.view(groups.shape)[row, group].tolist()
        assert codes == oracle.encode(groups[row, group].tolist(), scale, zero, levels)
        moved += abs(zero - iterates[0][0]) > 0.01
    assert moved > 0.5 * groups.shape[0] * groups.shape[1]


def test_real_zero_points_beat_rounding_and_integer_ones_would_not(weight):
    """Why no format with integer zero points holds them."""
    found = quantize(weight, None, parse_scheme("hqq-int3-g64-asym"), FLOAT32)
    rounded = quantize(weight, None, parse_scheme("rtn-int3-g64-asym"), FLOAT32)

    def error(values):
        return float((values - weight).square().mean())

    assert error(found.dequantize()) < 0.99 * error(rounded.dequantize())
    scales = found.scales.repeat_interleave(64, 1)
    zeros = found.zero_points.round().clamp(0, 7).repeat_interleave(64, 1)
    codes = (weight / scales + zeros).round().clamp(0, 7)
    assert error((codes - zeros) * scales) > error(found.dequantize())


def test_stored_zero_points_are_those_that_codes_were_chosen_with(weight):
    settings = QuantizationSettings(scale_dtype="bfloat16")
    found = quantize(weight, None, parse_scheme("hqq-int4-g64-asym"), settings)
    for part in (found.scales, found.zero_points):
        assert torch.equal(part, part.to(torch.bfloat16).float())
    steps = (weight / found.scales.repeat_interleave(64, 1)).view(24, 4, 64)
    codes = (steps + found.zero_points[:, :, None]).round().clamp(0, 15)
    assert torch.equal(codes.to(torch.uint8).view(24, 256), found.codes)


def test_groups_without_a_range():
    values = torch.zeros(4, 192)
    values[1] = 0.25
    values[2, 64:] = 1e-6 * torch.arange(128)
    found = quantize(values, None, parse_scheme("hqq-int4-g64-asym"), FLOAT32)
    assert torch.equal(found.dequantize()[:2], values[:2])
    assert (found.dequantize() - values)[2].abs().max() < 4e-6


@pytest.mark.parametrize("name", ["hqq-int4-g64-sym", "hqq-int4-gch-asym", "hqq-int7-g64-asym"])
def test_what_hqq_does_not_have_is_refused(weight, name):
    with pytest.raises(InputError, match=r"hqq stores int2, int3.*Use for example hqq-int4-g64"):
        quantize(weight, None, parse_scheme(name), FLOAT32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_error_is_not_above_the_librarys(weight, bits):
    library = pytest.importorskip("hqq.core.quantize").Quantizer
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    found = quantize(weight, None, scheme, FLOAT32).dequantize()
    codes, meta = library.quantize(
        weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32
    )
    meta["compute_dtype"] = torch.float32
    theirs = library.dequantize(codes, meta)
    assert (found - weight).square().mean() <= 1.0001 * (theirs - weight).square().mean()
    inputs = torch.randn(400, 256, generator=torch.Generator().manual_seed(1))
    statistics = cases.make_statistics(inputs)
    assert layer_error(weight, found, statistics) <= 1.02 * layer_error(weight, theirs, statistics)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_the_librarys_linear_reads_what_we_store(weight, bits):
    linear_type = pytest.importorskip("hqq.core.quantize").HQQLinear
    scheme = parse_scheme(f"hqq-int{bits}-g64-asym")
    found = quantize(weight, None, scheme, QuantizationSettings())
    tensors = get_format("hqq").pack("m", found, {}, torch.bfloat16)
    linear = linear_type(None, None, compute_dtype=torch.bfloat16, device="cpu")
    linear.load_state_dict({name.removeprefix("m."): value for name, value in tensors.items()})
    assert (linear.out_features, linear.in_features) == found.shape
    # It computes with bfloat16 codes and zero points: two roundings where ours has none.
    theirs = linear.dequantize().float()
    scales = found.scales.repeat_interleave(64, 1)
    assert ((theirs - found.dequantize()).abs() <= 2**-7 * scales * 2**bits).all()
    linear.meta["compute_dtype"] = torch.float32
    assert torch.equal(linear.dequantize().float(), found.dequantize())
