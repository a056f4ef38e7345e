"""Experts that saw few tokens: what helps them, against sums written out in float64."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.coverage import FittedStatistics, expert_coverage
from advisor.calibration.statistics import LayerStatistics
from advisor.calibration.tapes import InputTape
from advisor.modelspec import LinearSpec

INPUTS = 6
TOKENS = {"a.experts.0": 3, "a.experts.1": 0, "a.experts.2": 40, "b.experts.0": 5}


def spec(path: str, leaf: str) -> LinearSpec:
    group = f"{path}.gate_up" if leaf != "down" else f"{path}.down"
    return LinearSpec(f"{path}.{leaf}", INPUTS, 4, 0, group, path.partition(".")[0], True)


LINEARS = [spec(path, leaf) for path in TOKENS for leaf in ("gate", "up", "down")]


class Store:
    """Statistics of random inputs, other ones for every group."""

    def __init__(self):
        self.rows = {}
        for number, linear in enumerate(LINEARS):
            generator = torch.Generator().manual_seed(number)
            count = TOKENS[linear.name.rpartition(".")[0]]
            rows = torch.randn(count, INPUTS, generator=generator)
            self.rows.setdefault(linear.input_group, rows)

    def layer(self, linear, samples=None, *, gradients=True):
        rows = self.rows[linear.input_group]
        largest = rows.abs().amax(0) if len(rows) else torch.zeros(INPUTS)
        return LayerStatistics(len(rows), rows.T @ rows, largest, rows.abs().sum(0))

    def tokens(self, linear, samples=None):
        return len(self.rows[linear.input_group])


def test_few_tokens_are_joined_by_half_as_many_average_ones_as_there_are_inputs():
    store = Store()
    found = FittedStatistics(store, LINEARS).layer(LINEARS[2])
    assert LINEARS[2].name == "a.experts.0.down"
    own = store.rows["a.experts.0.down"].double()
    layer = torch.cat([store.rows[f"a.experts.{expert}.down"] for expert in range(3)]).double()
    average = layer.T @ layer / len(layer)
    torch.testing.assert_close(
        found.second_moment.double(), own.T @ own + INPUTS / 2 * average, rtol=1e-5, atol=1e-5
    )
    sums = own.abs().sum(0) + INPUTS / 2 * layer.abs().mean(0)
    torch.testing.assert_close(found.absolute_sum.double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.absolute_maximum.double(), layer.abs().amax(0))
    assert found.tokens == 3 + INPUTS // 2


def test_enough_tokens_stay_alone_and_none_at_all_are_replaced():
    store = Store()
    fitted = FittedStatistics(store, LINEARS)
    many = next(linear for linear in LINEARS if linear.name == "a.experts.2.gate")
    assert torch.equal(fitted.layer(many).second_moment, store.layer(many).second_moment)
    unseen = next(linear for linear in LINEARS if linear.name == "a.experts.1.up")
    rows = torch.cat([store.rows[f"a.experts.{expert}.gate_up"] for expert in range(3)])
    expected = INPUTS / 2 * (rows.T @ rows) / len(rows)
    torch.testing.assert_close(fitted.layer(unseen).second_moment, expected)


def test_coverage_counts_experts_by_layer():
    found = expert_coverage(Store(), LINEARS)
    assert found.layers == {"a.experts": (3, 0, 40), "b.experts": (5,)}
    assert (found.unseen, found.helped, found.median) == (1, 3, 4)
    dense = [LinearSpec("q", INPUTS, 4, 0, "q", "q")]
    assert expert_coverage(Store(), dense) is None


@pytest.mark.parametrize("is_expert", [True, False])
def test_a_tape_counts_the_tokens_of_experts(is_expert):
    model = torch.nn.Sequential(torch.nn.Linear(INPUTS, 4))
    linear = LinearSpec("0", INPUTS, 4, 0, "0", "0", is_expert)
    with InputTape(model, [linear], torch.device("cpu")) as tape:
        model(torch.ones(7, INPUTS))
        model(torch.ones(2, INPUTS))
        taken = tape.take()
        model(torch.ones(1, INPUTS))
        again = tape.take()
    if is_expert:
        assert (int(taken["0/tokens"]), int(again["0/tokens"])) == (9, 1)
    else:
        assert "0/tokens" not in taken
