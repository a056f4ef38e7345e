"""The nearest of a few values, by a table where there can be one."""

from __future__ import annotations

import pytest
import torch

from advisor.numerics.codebooks import codebook, decode_e4m3
from advisor.numerics.gguf_blocks import code_values
from advisor.numerics.nearest import Nearest, ties_of

_HALF = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
TABLES = {
    "e2m1": (torch.cat([-_HALF[1:].flip(0), _HALF]), True),
    "iq4_nl": (code_values("iq4_nl"), True),
    "nf4": (codebook("nf4"), False),
    "e4m3": (decode_e4m3(torch.arange(127, dtype=torch.uint8)), False),
    "two": (torch.tensor([-1.0, 2.0]), True),
    "one": (torch.tensor([3.0]), False),
}


@pytest.mark.parametrize("name", TABLES)
def test_what_a_table_says_is_what_a_search_finds(name):
    values, tabulated = TABLES[name]
    nearest, ties = Nearest(values), ties_of(values)
    assert (nearest._cells is not None) is tabulated
    around = [ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1), values, -values]
    ends = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf, 1e-40])
    spread = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * values.abs().max()
    wanted = torch.cat([*around, ends, spread])
    assert wanted.numel() > 1024
    expected = [int((ties < x).sum()) for x in wanted]  # the lower one in the middle of two
    assert nearest.indices(wanted).tolist() == expected
    assert torch.equal(nearest.values(wanted.view(1, -1))[0], values[torch.tensor(expected)])
    turned = wanted[:1200].view(30, 40).t()
    assert torch.equal(nearest.indices(turned), nearest.indices(turned.contiguous()))
    assert [int(nearest.indices(x.view(1))) for x in wanted[:40]] == expected[:40]
