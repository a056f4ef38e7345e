from __future__ import annotations

import pytest
import torch

from advisor.errors import InputError
from advisor.methods import rtn
from advisor.methods.checks import check_group_sizes
from advisor.methods.errors import layer_error
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

SETTINGS = QuantizationSettings()
EXACT = QuantizationSettings(scale_dtype="float32")


def test_groups_are_scaled_apart():
    weight = torch.tensor([[15.0, -30.0, 1500.0, 750.0, 0.0, 0.0]])
    found = rtn.quantize(weight, None, parse_scheme("rtn-int4-g2-sym"), EXACT)
    assert found.scales.tolist() == [[4.0, 200.0, 1.0]]
    assert found.codes.tolist() == [[12, 0, 15, 12, 8, 8]]
    assert found.zero_points is None


def test_asymmetric_zero_points():
    weight = torch.tensor([[-1.0, 2.0, 0.0, 3.0, 1.0, 0.5]])
    found = rtn.quantize(weight, None, parse_scheme("rtn-int2-g3-asym"), EXACT)
    assert found.scales.tolist() == [[1.0, 1.0]]
    assert found.zero_points.tolist() == [[1, 0]]
    assert found.codes.tolist() == [[0, 3, 1, 3, 1, 0]]
    assert found.dequantize().tolist() == [[-1.0, 2.0, 0.0, 3.0, 1.0, 0.0]]


@pytest.mark.parametrize("name", ["rtn-int4-g64-sym", "rtn-int3-g32-asym", "rtn-int2-gch-asym"])
def test_clipping_lowers_the_error_it_is_weighted_by(weight, statistics, name):
    scheme = parse_scheme(name)
    importance = statistics.second_moment.diagonal()
    errors = []
    for clip in ("none", "mse"):
        found = rtn.quantize(weight, statistics, scheme, QuantizationSettings(clip=clip))
        errors.append(((found.dequantize() - weight).square() * importance).sum(dim=1))
    assert bool((errors[1] <= errors[0]).all())
    assert errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("name", ["rtn-fp8-gch", "rtn-fp8-gtensor", "rtn-fp8-b64", "rtn-fp8-g64"])
def test_fp8_error_is_a_sixteenth_at_most(weight, name):
    found = rtn.quantize(weight, None, parse_scheme(name), SETTINGS)
    restored = found.dequantize()
    largest = weight.abs().max()
    assert bool(((restored - weight).abs() <= weight.abs() / 16 + largest * 2e-5).all())
    shapes = {"rtn-fp8-gch": (80, 1), "rtn-fp8-gtensor": (1, 1), "rtn-fp8-b64": (2, 3)}
    assert tuple(found.scales.shape) == shapes.get(name, (80, 3))


def test_error_falls_with_bits(weight, statistics):
    errors = [
        layer_error(
            weight,
            rtn.quantize(weight, None, parse_scheme(f"rtn-int{bits}-g64-sym"), SETTINGS),
            statistics,
        )
        for bits in range(2, 9)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 500 * errors[-1]


def test_overflowing_scale_is_refused(weight):
    settings = QuantizationSettings(scale_dtype="float16")
    with pytest.raises(InputError, match="larger than float16 can hold"):
        rtn.quantize(weight * 1e7, None, parse_scheme("rtn-int4-gch-sym"), settings)


def test_all_group_sizes_that_do_not_divide_are_listed():
    shapes = {"a": (64, 576), "b": (64, 576), "c": (64, 1536), "d": (64, 200)}
    schemes = [parse_scheme(f"rtn-int4-{g}-sym") for g in ("g128", "g64", "gch")]
    with pytest.raises(InputError) as caught:
        check_group_sizes(shapes, schemes)
    message = str(caught.value)
    assert message.startswith("3 problems:")
    assert "group_size=128 for 2 modules with in_features=576 (first: a)" in message
    assert "Use --group-size 64 or 32." in message
    assert message.count("in_features=200 (first: d)") == 2
    assert "1536" not in message


@pytest.mark.parametrize(
    ("weight", "scheme", "message"),
    [
        (torch.ones(4, 6), "rtn-int4-g4-sym", "got group_size=4 for 1 module with in_features=6"),
        (torch.ones(4), "rtn-int4-gch-sym", r"matrix .* of shape \[4\]"),
        (torch.ones(4, 4, dtype=torch.int64), "rtn-int4-gch-sym", "torch.int64"),
        (torch.full((2, 2), float("nan")), "rtn-int4-gch-sym", "not finite"),
        (torch.ones(4, 4), "rtn-int4-gtensor-sym", "got scheme rtn-int4-gtensor-sym"),
    ],
)
def test_bad_weights_are_refused(weight, scheme, message):
    with pytest.raises(InputError, match=message):
        rtn.quantize(weight, None, parse_scheme(scheme), SETTINGS)
