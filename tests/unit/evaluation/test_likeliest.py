"""The likeliest token, looked for in parts of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from advisor.evaluation.measure import likeliest


@pytest.mark.parametrize("vocabulary", [100, 16384, 50257, 49152])
def test_it_is_the_first_largest_value(vocabulary):
    values = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1))
    values[1, -1] = 9.0  # in what is left behind the last part
    values[2, 3] = values[2, vocabulary - 2] = 9.0
    values[3] = -1.0
    values[4, [vocabulary // 2, vocabulary // 2 + 1]] = 9.0
    assert torch.equal(likeliest(values), values.argmax(-1))
    assert likeliest(values)[[1, 2, 3, 4]].tolist() == [vocabulary - 1, 3, 0, vocabulary // 2]
