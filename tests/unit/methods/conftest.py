from __future__ import annotations

import pytest
import torch

from advisor.calibration.statistics import LayerStatistics


def statistics_of(inputs, gradients=None):
    """Statistics of input rows [tokens, in] and, if given, gradient rows [tokens, out]."""
    return LayerStatistics(
        tokens=inputs.shape[0],
        second_moment=inputs.t() @ inputs,
        absolute_maximum=inputs.abs().amax(dim=0),
        absolute_sum=inputs.abs().sum(dim=0),
        gradient_tokens=0 if gradients is None else gradients.shape[0],
        gradient_moment=None if gradients is None else gradients.t() @ gradients,
    )


def correlated_inputs(tokens, size, seed=0, outliers=0.8):
    """Input rows with correlated channels of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(size) + 0.15 * torch.randn(size, size, generator=generator)
    magnitudes = torch.exp(outliers * torch.randn(size, generator=generator))
    return torch.randn(tokens, size, generator=generator) @ mixing * magnitudes


@pytest.fixture
def make_statistics():
    return statistics_of


@pytest.fixture
def make_inputs():
    return correlated_inputs


@pytest.fixture(scope="session")
def inputs():
    return correlated_inputs(512, 192)


@pytest.fixture(scope="session")
def statistics(inputs):
    return statistics_of(inputs)


@pytest.fixture(scope="session")
def weight():
    """80 outputs, 192 inputs: three groups of 64, and not square."""
    generator = torch.Generator().manual_seed(7)
    return 0.05 * torch.randn(80, 192, generator=generator)
