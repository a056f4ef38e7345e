"""Weights on disk come back to the bit."""

from __future__ import annotations

import pytest
import torch

from advisor.numerics.quantized_weight import QuantizedWeight
from advisor.numerics.spilled_weights import SpilledWeights
from advisor.schemes import parse_scheme


def grouped():
    generator = torch.Generator().manual_seed(0)
    return QuantizedWeight(
        parse_scheme("gptq-int4-g32-asym"),
        torch.randint(0, 16, (6, 96), generator=generator, dtype=torch.uint8),
        torch.rand(6, 3, generator=generator),
        torch.randint(0, 16, (6, 3), generator=generator, dtype=torch.uint8),
        group_index=torch.arange(96, dtype=torch.int32).flip(0) // 32,
    )


def coded():
    return QuantizedWeight(
        parse_scheme("bnb-nf4"),
        torch.randint(0, 16, (4, 64), dtype=torch.uint8),
        torch.rand(4, 1),
        codebook=torch.linspace(-1, 1, 16),
        extras={"nested": torch.rand(3).bfloat16(), "offset": torch.tensor(0.5)},
    )


def test_every_field_comes_back(tmp_path):
    weights = {"a": grouped(), "b": coded()}
    spilled = SpilledWeights(tmp_path / "new")
    for name, weight in weights.items():
        spilled.add(name, weight)
    assert list(spilled) == ["a", "b"]
    assert len(spilled) == 2
    assert "c" not in spilled
    for name in ("b", "a", "b"):
        found, expected = spilled[name], weights[name]
        assert found.scheme == expected.scheme
        assert torch.equal(found.dequantize(), expected.dequantize())
        for field in ("codes", "scales", "zero_points", "group_index", "codebook"):
            ours, theirs = getattr(found, field), getattr(expected, field)
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert torch.equal(ours, theirs)
                assert ours.dtype == theirs.dtype
        assert found.extras.keys() == expected.extras.keys()
        assert all(torch.equal(found.extras[key], expected.extras[key]) for key in found.extras)
    with pytest.raises(KeyError):
        spilled["c"]


def test_the_file_has_no_name_and_grows_by_what_is_added(tmp_path):
    spilled = SpilledWeights(tmp_path)
    spilled.add("a", grouped())
    assert spilled.size_bytes == 6 * 96 + 6 * 3 * 4 + 6 * 3 + 96 * 4
    assert not list(tmp_path.iterdir())
