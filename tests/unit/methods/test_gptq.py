from __future__ import annotations

import dataclasses

import pytest
import torch

from advisor.errors import InputError
from advisor.methods import gptq, gptq_loops, registry
from advisor.methods.errors import layer_error, row_errors
from advisor.methods.gptq_columns import blocks_of
from advisor.methods.ordering import activation_order
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme

SETTINGS = QuantizationSettings()
SCHEMES = [
    parse_scheme(name)
    for name in (
        "gptq-int4-g64-sym",
        "gptq-int2-g64-asym",
        "gptq-int8-g32-sym",
        "gptq-int3-g48-asym",
        "gptq-int4-g96-sym",
        "gptq-int4-gch-asym",
        "gptq-int5-g12-sym",
        "gptq-int4-g64-sym-actorder",
        "gptq-int3-g16-asym-actorder",
        "gptq-int6-gch-sym-actorder",
    )
]


def assert_same(left, right):
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales, right.scales)
    for name in ("zero_points", "group_index"):
        first, second = getattr(left, name), getattr(right, name)
        assert (first is None) == (second is None), name
        assert first is None or torch.equal(first, second), name


def rounded(weight, statistics, scheme, settings=SETTINGS):
    plain = dataclasses.replace(scheme, method="rtn", activation_order=False)
    return registry.quantize(weight, statistics, plain, settings)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_many_at_once_equal_one_by_one(weight, statistics, clip, static_groups):
    settings = QuantizationSettings(clip=clip, static_groups=static_groups)
    together = gptq.quantize_many(weight, statistics, SCHEMES, settings)
    for scheme, found in zip(SCHEMES, together, strict=True):
        assert found.scheme == scheme
        assert_same(found, gptq.quantize(weight, statistics, scheme, settings))


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_uncorrelated_inputs_leave_nothing_but_rounding(weight, make_statistics, scheme, clip):
    identity = make_statistics(torch.eye(192))
    settings = QuantizationSettings(clip=clip)
    found = gptq.quantize(weight, identity, scheme, settings)
    assert torch.equal(found.dequantize(), rounded(weight, identity, scheme, settings).dequantize())


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.bits > 2], ids=str)
def test_error_is_below_that_of_rounding(weight, statistics, scheme, static_groups):
    settings = QuantizationSettings(static_groups=static_groups)
    found = gptq.quantize(weight, statistics, scheme, settings)
    plain = rounded(weight, statistics, scheme)
    assert layer_error(weight, found, statistics) < 0.8 * layer_error(weight, plain, statistics)


@pytest.mark.parametrize("static_groups", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_clipping_helps_coarse_grids_and_harms_no_fine_one(
    make_inputs, make_statistics, weight, bits, static_groups
):
    inputs = make_inputs(2048, 192, 3)
    fitted, judges = make_statistics(inputs[:1024]), make_statistics(inputs[1024:])
    errors = []
    for clip in ("none", "mse"):
        settings = QuantizationSettings(clip=clip, damping=0.05, static_groups=static_groups)
        scheme = parse_scheme(f"gptq-int{bits}-g64-sym")
        found = gptq.quantize(weight, fitted, scheme, settings)
        errors.append(layer_error(weight, found, judges))
    assert errors[1] < {2: 0.8, 3: 0.9, 4: 0.98, 8: 1.01}[bits] * errors[0]


def test_first_column_is_rounded_and_second_makes_up_for_it(make_inputs, make_statistics):
    statistics = make_statistics(make_inputs(200, 6))
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    scheme = parse_scheme("gptq-int3-g2-sym")
    found = gptq.quantize(weight, statistics, scheme, SETTINGS).dequantize()
    plain = rounded(weight, statistics, scheme).dequantize()
    assert torch.equal(found[:, 0], plain[:, 0])
    # The optimal update of column 1, with the inverse of the whole damped H (Algorithm 1).
    moment = statistics.second_moment.double()
    moment = moment + 0.01 * moment.diagonal().mean() * torch.eye(6)
    inverse = torch.linalg.inv(moment)
    error = (weight - found)[:, 0].double() / inverse[0, 0]
    updated = weight[:, 1].double() - error * inverse[0, 1]
    scale = registry.quantize(weight, statistics, scheme, SETTINGS).scales[:, 0]
    nearest = torch.clamp(torch.round(updated / scale), -4, 3) * scale
    torch.testing.assert_close(found[:, 1], nearest.float())


@pytest.mark.parametrize("column_block", [1, 5, 16, 40, 192, 1000])
def test_block_size_changes_no_more_than_rounding_does(weight, statistics, column_block):
    scheme = parse_scheme("gptq-int4-g64-sym")
    base = gptq.quantize(weight, statistics, scheme, SETTINGS)
    other = gptq.quantize(
        weight, statistics, scheme, QuantizationSettings(column_block=column_block)
    )
    assert (base.codes != other.codes).float().mean() < 0.02
    assert layer_error(weight, other, statistics) == pytest.approx(
        layer_error(weight, base, statistics), rel=0.02
    )


@pytest.mark.parametrize("width", [1, 5, 12, 32, 48, 64, 96, 192, 240, 960])
@pytest.mark.parametrize("column_block", [1, 7, 64, 128, 2000])
def test_every_group_is_up_to_date_where_it_starts(width, column_block):
    blocks = blocks_of(960, width, column_block)
    assert [edges[0] for edges in blocks[1:]] == [edges[-1] for edges in blocks[:-1]]
    assert (blocks[0][0], blocks[-1][-1]) == (0, 960)
    for start in range(0, 960, width):
        (home,) = [edges for edges in blocks if edges[0] <= start < edges[-1]]
        assert start in home
        assert start == home[0] or start + width <= home[-1]


@pytest.mark.parametrize("outer", [32, 128])
def test_scales_come_from_updated_weights(weight, statistics, outer):
    scheme = parse_scheme("gptq-int2-g64-sym")
    settings = QuantizationSettings(column_block=outer, scale_dtype="float32")
    found = gptq.quantize(weight, statistics, scheme, settings)
    plain = rounded(weight, statistics, scheme, settings)
    assert torch.equal(found.scales[:, 0], plain.scales[:, 0])
    # Updates change nearly every row's largest weight of the later groups.
    assert (found.scales[:, 1:] != plain.scales[:, 1:]).float().mean() > 0.9


def test_act_order_codes_are_in_the_models_order(weight, statistics):
    scheme = parse_scheme("gptq-int8-g64-sym-actorder")
    found = gptq.quantize(weight, statistics, scheme, SETTINGS)
    order = activation_order(statistics.second_moment)
    assert found.group_index.dtype == torch.int32
    assert torch.equal(found.group_index[order].long(), torch.arange(192) // 64)
    assert (found.dequantize() - weight).abs().max() < 0.01


def test_act_order_equals_quantizing_the_permuted_problem(weight, inputs, make_statistics):
    order = activation_order(make_statistics(inputs).second_moment)
    ordered = gptq.quantize(
        weight, make_statistics(inputs), parse_scheme("gptq-int4-g64-asym-actorder"), SETTINGS
    )
    permuted = gptq.quantize(
        weight[:, order],
        make_statistics(inputs[:, order]),
        parse_scheme("gptq-int4-g64-asym"),
        SETTINGS,
    )
    # The second moment is summed anew for the permuted inputs, so allow for its rounding.
    assert (ordered.codes[:, order] != permuted.codes).float().mean() < 0.01


def test_act_order_per_channel_needs_no_index(weight, statistics):
    found = gptq.quantize(weight, statistics, parse_scheme("gptq-int4-gch-sym-actorder"), SETTINGS)
    assert found.group_index is None
    static = gptq.quantize(
        weight,
        statistics,
        parse_scheme("gptq-int4-gch-sym"),
        QuantizationSettings(static_groups=True),
    )
    assert torch.equal(found.codes, static.codes)


def test_static_groups_keep_the_scales_of_rounding(weight, statistics):
    scheme = parse_scheme("gptq-int4-g64-asym")
    found = gptq.quantize(weight, statistics, scheme, QuantizationSettings(static_groups=True))
    plain = rounded(weight, statistics, scheme)
    assert torch.equal(found.scales, plain.scales)
    assert torch.equal(found.zero_points, plain.zero_points)
    assert found.group_index is None
    natural = gptq.quantize(weight, statistics, scheme, SETTINGS)
    assert layer_error(weight, found, statistics) < layer_error(weight, natural, statistics)


def test_a_transposed_weight_is_not_overwritten(weight, statistics):
    transposed = weight.t().contiguous().t()  # its transpose is contiguous memory
    kept = transposed.clone()
    gptq.quantize(transposed, statistics, SCHEMES[0], SETTINGS)
    assert torch.equal(transposed, kept)


def test_dead_inputs_are_rounded_and_change_nothing_else(weight, inputs, make_statistics):
    dead = [3, 64, 191]
    live = inputs.clone()
    live[:, dead] = 0.0
    scheme = parse_scheme("gptq-int4-g64-sym")
    settings = QuantizationSettings(static_groups=True)  # scales that do not depend on updates
    statistics = make_statistics(live)
    found = gptq.quantize(weight, statistics, scheme, settings).dequantize()
    plain = rounded(weight, statistics, scheme).dequantize()
    assert torch.equal(found[:, dead], plain[:, dead])
    other = weight.clone()
    other[:, dead] = -0.5 * other[:, dead]
    changed = gptq.quantize(other, statistics, scheme, settings)
    same_scale = changed.scales == rounded(weight, statistics, scheme).scales
    assert same_scale.float().mean() > 0.9
    rows = same_scale.all(dim=1)
    others = [i for i in range(192) if i not in dead]
    assert torch.equal(changed.dequantize()[rows][:, others], found[rows][:, others])


def test_fewer_tokens_than_inputs(weight, make_inputs, make_statistics):
    statistics = make_statistics(make_inputs(20, 192))
    scheme = parse_scheme("gptq-int4-g64-sym")
    found = gptq.quantize(weight, statistics, scheme, SETTINGS)
    plain = rounded(weight, statistics, scheme)
    assert "damping" not in found.extras
    assert layer_error(weight, found, statistics) < 0.5 * layer_error(weight, plain, statistics)


def test_all_inputs_dead(weight, make_statistics):
    statistics = make_statistics(torch.zeros(4, 192))
    scheme = parse_scheme("gptq-int4-g64-sym")
    found = gptq.quantize(weight, statistics, scheme, SETTINGS)
    assert torch.equal(found.codes, rounded(weight, statistics, scheme).codes)


def test_raised_damping_is_a_field_of_the_result(weight, statistics):
    moment = statistics.second_moment.clone()
    moment[0, 1] = moment[1, 0] = 1.5 * float(torch.sqrt(moment[0, 0] * moment[1, 1]))
    broken = dataclasses.replace(statistics, second_moment=moment)
    found = gptq.quantize(weight, broken, parse_scheme("gptq-int4-g64-sym"), SETTINGS)
    assert float(found.extras["damping"]) > SETTINGS.damping


def test_rows_are_independent_of_each_other(weight, statistics):
    scheme = parse_scheme("gptq-int4-g32-asym")
    whole = gptq.quantize(weight, statistics, scheme, SETTINGS)
    for rows in (slice(0, 48), slice(48, 80)):
        part = gptq.quantize(weight[rows], statistics, scheme, SETTINGS)
        assert (part.codes != whole.codes[rows]).float().mean() < 0.01
    separate = row_errors(weight, whole, statistics)
    part = row_errors(weight[48:], whole.dequantize()[48:], statistics)
    torch.testing.assert_close(separate[48:], part)


def test_rows_in_parts_give_the_same_codes(weight, statistics, monkeypatch):
    schemes = SCHEMES[:3]
    whole = gptq.quantize_many(weight, statistics, schemes, SETTINGS)
    monkeypatch.setattr(gptq_loops, "_WORKING_BYTES", 4 * 192 * 32)
    parts = gptq.quantize_many(weight, statistics, schemes, SETTINGS)
    for left, right in zip(whole, parts, strict=True):
        assert left.codes.shape == right.codes.shape
        assert (left.codes != right.codes).float().mean() < 0.01


def test_a_grouped_scheme_is_not_bound_to_powers_of_two(weight, statistics):
    found = gptq.quantize(weight, statistics, parse_scheme("gptq-int4-g3-sym"), SETTINGS)
    assert found.scales.shape == (80, 64)


@pytest.mark.parametrize(
    ("scheme", "settings", "message"),
    [
        ("gptq-fp8-gch", SETTINGS, "got scheme gptq-fp8-gch"),
        ("gptq-int4-g64-sym", QuantizationSettings(column_block=0), "column_block must be"),
        ("gptq-int4-g64-sym", QuantizationSettings(damping=-1), "damping must be above 0"),
        ("gptq-int4-g64-sym", QuantizationSettings(clip="l2"), "clip must be 'none' or 'mse'"),
    ],
)
def test_bad_requests_are_refused(weight, statistics, scheme, settings, message):
    with pytest.raises(InputError, match=message):
        gptq.quantize(weight, statistics, parse_scheme(scheme), settings)


def test_statistics_are_needed_and_must_fit(weight, statistics):
    scheme = parse_scheme("gptq-int4-g64-sym")
    with pytest.raises(InputError, match="gptq needs calibration statistics"):
        gptq.quantize(weight, None, scheme, SETTINGS)
    with pytest.raises(InputError, match="of 192 inputs, but the weight has 128"):
        gptq.quantize(weight[:, :128], statistics, scheme, SETTINGS)
    with pytest.raises(InputError, match="statistics have 0"):
        gptq.quantize(weight, dataclasses.replace(statistics, tokens=0), scheme, SETTINGS)
