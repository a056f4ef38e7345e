"""Weights and inputs that quantizers are tried on, and how their results are compared."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference_quantizers as oracle
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.methods.settings import QuantizationSettings

TIE = 1e-4
"""Steps of the grid from a tie within which float32 may round the other way."""
FLOAT32 = QuantizationSettings(scale_dtype="float32")
STORED = {True: QuantizationSettings(), False: FLOAT32}
"""Settings by symmetry. A symmetric scale puts the largest magnitude of a group at a tie, half a
step outside the grid on the positive side; with a scale rounded to bfloat16 it is none, and codes
are decided. An asymmetric grid has no such ties."""
ROWS, COLUMNS, TOKENS, DEAD = 10, 48, 160, 29


def make_inputs(seed: int) -> torch.Tensor:
    """Correlated inputs of very different magnitudes, one channel never active; float32."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(COLUMNS, COLUMNS)) / math.sqrt(COLUMNS) + np.eye(COLUMNS)
    values = generator.normal(size=(TOKENS, COLUMNS)) @ mixing
    values *= np.exp(generator.normal(size=COLUMNS))
    values[:, DEAD] = 0.0
    return torch.tensor(values, dtype=torch.float32)


def make_weight(seed: int, rows: int = ROWS) -> torch.Tensor:
    """Heavy-tailed weights with two large outliers and a group of zeros."""
    generator = np.random.default_rng(100 + seed)
    weight = 0.05 * generator.standard_t(4, size=(rows, COLUMNS))
    weight[1, 5], weight[4, 40] = 1.7, -2.3
    weight[3, :16] = 0.0
    # All of one sign: an asymmetric grid must still hold zero.
    weight[6, 16:32] = np.abs(weight[6, 16:32]) + 0.1
    return torch.tensor(weight, dtype=torch.float32)


def make_statistics(inputs: torch.Tensor, gradients: torch.Tensor | None = None) -> LayerStatistics:
    exact = inputs.double()
    moment = None if gradients is None else (gradients.double().T @ gradients.double()).float()
    return LayerStatistics(
        tokens=len(inputs),
        second_moment=(exact.T @ exact).float(),
        absolute_maximum=inputs.abs().amax(0),
        absolute_sum=exact.abs().sum(0).float(),
        gradient_tokens=0 if gradients is None else len(gradients),
        gradient_moment=moment,
    )


def correlated_inputs(
    columns: int, tokens: int, seed: int, first: float, last: float
) -> torch.Tensor:
    """Inputs of forty common directions and some noise, from one magnitude to another."""
    mix = torch.randn(40, columns, generator=torch.Generator().manual_seed(1)) / 6
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(tokens, 40, generator=generator) @ mix
    noise = 0.3 * torch.randn(tokens, columns, generator=generator)
    return (common + noise) * torch.linspace(first, last, columns)


def joint_gradients(rows: int) -> torch.Tensor:
    """Output gradients of three common directions and some noise."""
    generator = torch.Generator().manual_seed(8)
    joint = torch.randn(3, rows, generator=generator)
    gradients = torch.randn(900, 3, generator=generator) @ joint
    return gradients + 0.4 * torch.randn(900, rows, generator=generator)


def double(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def width_of(scheme) -> int:
    return COLUMNS if scheme.granularity == "channel" else scheme.group_size


def clip_factors(settings, scheme) -> list[float]:
    steps, shrink = settings.clip_steps, settings.clip_shrink
    return oracle.clip_factors(steps, shrink, int(scheme.bits), width_of(scheme))


def grid_of(scheme, settings=None):
    settings = settings or STORED[scheme.symmetric]
    return oracle.Grid(int(scheme.bits), bool(scheme.symmetric), settings.scale_dtype)


def _zeros(found, scheme) -> np.ndarray:
    if found.zero_points is None:
        assert scheme.symmetric
        return np.full(tuple(found.scales.shape), 2 ** (int(scheme.bits) - 1))
    return found.zero_points.numpy().astype(int)


def compare(found, expected, scheme, *, in_order=None, ties: int = 2) -> None:
    """Codes equal but for ties; scales and zero points equal where no tie came before.

    With ``in_order``, columns depend on earlier ones of the same row (GPTQ): after a value that
    is at a tie, the rest of that row is not compared, so such rows are counted and few.
    """
    codes = found.codes.numpy().astype(int)
    assert codes.shape == expected.codes.shape
    index = found.group_index
    groups = expected.group_of if index is None else index.numpy()
    np.testing.assert_array_equal(groups, expected.group_of)
    order = list(range(codes.shape[1])) if in_order is None else in_order
    zeros, allowed = _zeros(found, scheme), 0
    for row in range(codes.shape[0]):
        for column in order:
            group = expected.group_of[column]
            assert float(found.scales[row, group]) == pytest.approx(
                expected.scales[row, group], rel=3e-6
            ), f"scale of row {row}, group {group}"
            assert zeros[row, group] == expected.zeros[row, group], f"zero point {row}, {group}"
            if codes[row, column] == expected.codes[row, column]:
                continue
            assert abs(codes[row, column] - expected.codes[row, column]) == 1
            assert expected.margins[row, column] < TIE, f"code of row {row}, column {column}"
            allowed += 1
            if in_order is not None:
                break
    assert allowed <= ties


def same_error(found, expected, weight, inputs, rel: float) -> None:
    """The quantized weights are equally good on the raw inputs."""
    ours = ((double(inputs) @ (double(found.dequantize()) - double(weight)).T) ** 2).sum()
    theirs = ((double(inputs) @ (expected.dequantize() - double(weight)).T) ** 2).sum()
    assert ours == pytest.approx(theirs, rel=rel)


def undecided(losses: dict) -> bool:
    """Whether the two best clipped ranges of a group are equally good within float32."""
    ranked = sorted(losses)
    return len(ranked) > 1 and ranked[1] - ranked[0] <= 1e-5 * max(ranked[0], 1e-30)
