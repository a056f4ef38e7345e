"""What rounding inputs costs, against sums over every token, input and output in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import reference_arithmetic as arithmetic
import reference_microscaling as floats
import torch

from advisor.calibration.statistics import LayerStatistics
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.schemes import parse_scheme
from advisor.search.input_noise import InputNoise, noise_terms, weighted_mean_squares

TOKENS, INPUTS, OUTPUTS = 7, 96, 5
SCHEMES = {
    "int8": "rtn-int8-gch-sym-aint8", "fp8": "rtn-fp8-gch-afp8", "mxfp4": "mxfp4-amxfp4",
    "mxfp8": "mxfp8-amxfp8", "nvfp4": "nvfp4-anvfp4",
}  # fmt: skip


def rounded_token(values, kind, largest):
    """One token's inputs as the format's description has them, float64; at least three groups."""
    if kind == "int8":
        scale = max(abs(v) for v in values) / 127
        return [round(v / scale) * scale for v in values]
    if kind == "fp8":
        return floats.fp8_block(values)
    if kind == "nvfp4":
        whole = [values[i : i + 16] for i in range(0, len(values), 16)]
        blocks = [floats.nvfp4_block(part, 448 * 6 / largest)[1] for part in whole]
    else:
        table, rule = (floats.E2M1, "even") if kind == "mxfp4" else (floats.E4M3, "ceil")
        whole = [values[i : i + 32] for i in range(0, len(values), 32)]
        blocks = [floats.mx_block(part, table, rule)[1] for part in whole]
    return [value for block in blocks for value in block]


@pytest.fixture(scope="module")
def case():
    generator = np.random.default_rng(5)
    size = np.exp(generator.normal(size=INPUTS))
    rows = (generator.normal(size=(TOKENS, INPUTS)) * size).astype(np.float32)
    return SimpleNamespace(
        rows=rows, weights=generator.uniform(0, 2, TOKENS).astype(np.float32),
        weight=generator.normal(size=(OUTPUTS, INPUTS)).astype(np.float32),
        gradients=generator.normal(size=(TOKENS, OUTPUTS)).astype(np.float32),
    )  # fmt: skip


@pytest.fixture
def book(case, random_llama, tmp_path):
    """A book whose statistics are those of the case."""
    moment = torch.zeros(INPUTS, INPUTS)
    maximum = torch.from_numpy(np.abs(case.rows).max(0))
    known = LayerStatistics(TOKENS, moment, maximum, maximum)
    store = SimpleNamespace(
        key="case", layer=lambda linear, gradients: known,
        weights=lambda linear: torch.from_numpy(case.weights),
    )  # fmt: skip
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    sequences = TokenSequences(tokens, "case", "0" * 8, 0, hash_tokens(tokens))
    return InputNoise(random_llama, store, sequences, tmp_path)


@pytest.mark.parametrize("kind", SCHEMES)
def test_mean_squares_are_those_of_the_format(case, book, kind):
    linear = SimpleNamespace(in_features=INPUTS, is_expert=False, input_group="case")
    found = book._of_rows(linear, torch.from_numpy(case.rows), kind, None)
    largest = float(np.abs(case.rows).max())
    expected, total = np.zeros(INPUTS), float(case.weights.astype(np.float64).sum())
    for token in range(TOKENS):
        values = [float(value) for value in case.rows[token]]
        for index, value in enumerate(rounded_token(values, kind, largest)):
            expected[index] += case.weights[token] * (value - values[index]) ** 2 / total
    # A value next to the middle of two codes may fall on the other side in float32.
    close = np.isclose(found.double().numpy(), expected, rtol=1e-3, atol=1e-12)
    assert close.mean() > 0.95
    assert float(found.double().sum()) == pytest.approx(expected.sum(), rel=0.02)


@pytest.mark.parametrize("moment", ["whole", "diagonal", "none"])
def test_noise_terms_sum_over_every_input_and_pair_of_outputs(case, moment):
    squares = np.random.default_rng(6).uniform(0, 1, INPUTS)
    gradient = case.gradients.T.astype(np.float64) @ case.gradients.astype(np.float64)
    kl = outputs = 0.0
    for j in range(INPUTS):
        for a in range(OUTPUTS):
            outputs += squares[j] * float(case.weight[a, j]) ** 2
            for b in range(OUTPUTS):
                if moment == "whole" or a == b:
                    share = gradient[a, b] / TOKENS if moment != "none" else 1.0
                    product = float(case.weight[a, j]) * float(case.weight[b, j])
                    kl += 0.5 * squares[j] * share * product
    given = {"whole": torch.from_numpy(gradient).float(), "none": None}
    given["diagonal"] = torch.from_numpy(np.diagonal(gradient).copy()).float()
    statistics = LayerStatistics(
        TOKENS, torch.zeros(INPUTS, INPUTS), torch.zeros(INPUTS), torch.zeros(INPUTS),
        0 if moment == "none" else TOKENS, given[moment],
    )  # fmt: skip
    found = noise_terms(
        torch.from_numpy(case.weight), torch.from_numpy(squares).float(), statistics
    )
    assert found == pytest.approx((kl, outputs), rel=1e-5)


def test_tokens_weigh_as_they_do_in_the_second_moment():
    errors = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    assert weighted_mean_squares(errors, None).tolist() == [5.0, 2.0]
    assert weighted_mean_squares(errors, torch.tensor([3.0, 1.0])).tolist() == [3.0, 3.0]
    assert weighted_mean_squares(errors, torch.zeros(2)).tolist() == [5.0, 2.0]


def test_the_int8_twin_is_that_of_the_runtime(case):
    """The same textbook twin that the runtime's products are held to."""
    codes = np.eye(INPUTS, dtype=np.int64)
    product = arithmetic.int8_product(case.rows, codes, np.ones(INPUTS))
    expected = [rounded_token([float(v) for v in row], "int8", 0.0) for row in case.rows]
    assert np.allclose(product, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", SCHEMES)
def test_nothing_is_known_of_groups_that_do_not_divide(book, kind):
    scheme = parse_scheme(SCHEMES[kind])
    odd = SimpleNamespace(in_features=40, is_expert=False, input_group="case")
    if kind not in ("int8", "fp8"):
        assert book.mean_squares(odd, scheme, None) is None
