"""What outputs send back: against the written out sum; its second moment is the Fisher's."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.fisher import loss_gradients, sign_source
from tests.oracles.reference_fisher import sent_back


def source(seed=0):
    return sign_source(torch.arange(9), seed)


@pytest.mark.parametrize("size", [5, 30, 91])
def test_each_row_is_the_sum_over_the_vocabulary(size):
    torch.manual_seed(size)
    logits = torch.randn(7, size) * 3
    expected = sent_back(logits, source())
    found = loss_gradients(logits, source())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    one_by_one = source()
    rows = [loss_gradients(logits[start : start + 2], one_by_one) for start in range(0, 7, 2)]
    assert torch.equal(torch.cat(rows), found)


@pytest.mark.parametrize("size", [3, 40, 100])
@pytest.mark.parametrize("scale", [0.0, 2.0])  # 0: equal chances, where all signs together count
def test_the_second_moment_is_the_fisher_information(size, scale):
    torch.manual_seed(size)
    row = torch.randn(size) * scale
    count = 60_000
    found = loss_gradients(row.expand(count, size), source()).double()
    chances = row.double().softmax(-1)
    fisher = chances.diag() - chances[:, None] * chances
    error = found.T @ found / count - fisher
    # Each product errs by about its own size over the root of the number of draws.
    assert float(error.norm()) < 3 * float(fisher.trace()) / count**0.5
    assert float(found.mean(0).norm()) < 3 * float(fisher.trace()) ** 0.5 / count**0.5
    # Tokens next to each other send back what is independent.
    crossed = found[:-1].T @ found[1:] / count
    assert float(crossed.norm()) < 3 * float(fisher.trace()) / count**0.5


def test_a_sure_token_weighs_much_the_same_in_every_draw():
    """Where labels are drawn, its weight is nearly always nothing and seldom very large."""
    logits = torch.zeros(1, 200)
    logits[0, 3] = 10.0  # p = 0.991
    weights = loss_gradients(logits.expand(5000, -1), source()).square().sum(1)
    chances = logits[0].softmax(-1)
    truth = float((chances * (1 - chances)).sum())
    assert float(weights.mean()) == pytest.approx(truth, rel=0.05)
    assert float(weights.std()) < truth
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(chances, 5000, replacement=True, generator=generator)
    drawn = (torch.eye(200)[labels] - chances).square().sum(1)
    assert float(drawn.std()) > 8 * truth
