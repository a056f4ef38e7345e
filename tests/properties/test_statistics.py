"""Merging and rescaling statistics, and packed moments, on arbitrary inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.calibration.moments import SecondMoment, packed_length, unpack_moment
from advisor.calibration.statistics import LayerStatistics, merge, scale_inputs
from advisor.errors import InputError

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 12)


def statistics_of(rows, gradients=None):
    return LayerStatistics(
        tokens=len(rows),
        second_moment=rows.T @ rows,
        absolute_maximum=rows.abs().amax(0),
        absolute_sum=rows.abs().sum(0),
        gradient_tokens=0 if gradients is None else len(gradients),
        gradient_moment=None if gradients is None else gradients.T @ gradients,
    )


def integers(seed, tokens, size):
    """Small whole numbers: their float32 sums are exact, so equality can be asked for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, (tokens, size), generator=generator).float()


def assert_equal(ours, theirs):
    assert (ours.tokens, ours.gradient_tokens) == (theirs.tokens, theirs.gradient_tokens)
    for name in ("second_moment", "absolute_maximum", "absolute_sum", "gradient_moment"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@settings(max_examples=50, deadline=None)
@given(seeds, sizes, st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_merge_is_exact_commutative_and_associative(seed, size, counts):
    rows = integers(seed, sum(counts), size)
    back = integers(seed + 1, sum(counts), size + 2)
    a, b, c = (
        statistics_of(*pair) for pair in zip(rows.split(counts), back.split(counts), strict=True)
    )
    whole = statistics_of(rows, back)
    assert_equal(merge(merge(a, b), c), whole)
    assert_equal(merge(a, merge(b, c)), whole)
    assert_equal(merge(merge(c, a), b), whole)


@settings(max_examples=30, deadline=None)
@given(seeds, sizes)
def test_scaling_is_what_scaled_inputs_give(seed, size):
    rows = integers(seed, 7, size)
    generator = torch.Generator().manual_seed(seed)
    scales = 2.0 ** torch.randint(-3, 4, (size,), generator=generator)
    ours = scale_inputs(statistics_of(rows, rows), scales)
    expected = statistics_of(rows / scales, rows)
    assert_equal(ours, expected)
    assert_equal(scale_inputs(ours, 1 / scales), statistics_of(rows, rows))


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([1, 2, 255, 256, 257, 513, 600]), st.integers(1, 5))
def test_packed_moments_are_the_product(seed, size, batches):
    rows = integers(seed, 6 * batches, size)
    moment = SecondMoment(size)
    for part in rows.split(6):
        moment.add(part)
    packed = moment.take()
    assert packed.shape == (packed_length(size),)
    assert torch.equal(unpack_moment(packed, size), rows.T @ rows)
    assert not moment.take().any()


def test_full_and_diagonal_gradients_merge_to_a_diagonal():
    rows, back = integers(0, 5, 3), integers(1, 5, 4)
    full = statistics_of(rows, back)
    diagonal = LayerStatistics(
        5, full.second_moment, full.absolute_maximum, full.absolute_sum, 5,
        full.gradient_moment.diagonal(),
    )  # fmt: skip
    assert torch.equal(merge(full, diagonal).gradient_moment, 2 * full.gradient_moment.diagonal())


def test_what_cannot_be_merged():
    a, b = statistics_of(integers(0, 5, 3)), statistics_of(integers(0, 5, 4))
    with pytest.raises(InputError, match="different linears"):
        merge(a, b)
    with pytest.raises(InputError, match="with and without gradients"):
        merge(a, statistics_of(integers(0, 5, 3), integers(1, 5, 3)))


@pytest.mark.parametrize("scales", [[1.0, 0.0], [1.0, -1.0], [1.0, float("inf")], [1.0]])
def test_impossible_scales(scales):
    with pytest.raises(InputError):
        scale_inputs(statistics_of(integers(0, 5, 2)), torch.tensor(scales))
