"""What quantizing holds at its most: tensors alive at once, counted as they come and go."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advisor.calibration.statistics import LayerStatistics
from advisor.methods.registry import quantize_each, quantize_many
from advisor.methods.settings import QuantizationSettings
from advisor.numerics.linear_algebra import inverse_cholesky
from advisor.schemes import parse_scheme

IN, OUT = 192, 512
SETTINGS = QuantizationSettings(
    descent=1, output_feedback=0.7, static_groups=True, damping=0.1, clip_steps=2
)


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still referred to."""

    def __init__(self, *given):
        super().__init__()
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}
        self.bytes = self.most = 0
        self._holders = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._take_up(tensor)
        return found

    def _take_up(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self._given:
            return
        if place not in self._holders:
            self._holders[place] = 0
            self.bytes += size
            self.most = max(self.most, self.bytes)
        self._holders[place] += 1
        weakref.finalize(tensor, self._leave, place, size)

    def _leave(self, place, size):
        self._holders[place] -= 1
        if not self._holders[place]:
            del self._holders[place]
            self.bytes -= size


def statistics(width=IN, height=OUT):
    generator = torch.Generator().manual_seed(width + height)
    rows = torch.randn(400, width, generator=generator)
    sent = torch.randn(600, height, generator=generator)
    return LayerStatistics(
        tokens=400, second_moment=rows.T @ rows, absolute_maximum=rows.abs().amax(0),
        absolute_sum=rows.abs().sum(0), gradient_tokens=600, gradient_moment=sent.T @ sent,
    )  # fmt: skip


def most_alive(work, *given):
    with Alive(*given) as alive:
        result = work()
    assert result is not None
    return alive.most


@pytest.mark.parametrize(("name", "weights_held"), [("gptq-int4-g32-asym", 5), ("nvfp4", 6)])
def test_linears_with_feedback_among_outputs(name, weights_held):
    weights = [torch.randn(OUT, IN, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    both = [statistics()] * 2
    scheme = parse_scheme(name)
    given = (*weights, both[0].second_moment, both[0].gradient_moment)
    most = most_alive(lambda: quantize_each(weights, both, scheme, SETTINGS), *given)
    # W, its errors, codes and changes, and its order; what is believed of G, and what it feeds
    # back. The search counts with 24·in·O + 12·S + 20·in², where G itself is 4·S.
    size, moments = IN * 2 * OUT, 2 * OUT**2
    held = 4 * weights_held * size + 8 * moments
    assert held < most < 1.15 * held + 20 * IN**2  # and a wave's own


def test_many_types_at_once():
    weight = torch.randn(2 * OUT, IN, generator=torch.Generator().manual_seed(0))
    plain, known = replace(SETTINGS, descent=0, output_feedback=0.0), statistics()
    names = [f"gptq-int{bits}-g{width}-{kind}" for bits in (3, 4, 8) for width in (16, 32, 64)
             for kind in ("sym", "asym")]  # fmt: skip
    schemes = [parse_scheme(name) for name in names[:10]]
    given = (weight, known.second_moment)
    most = most_alive(lambda: quantize_many(weight, known, schemes, plain), *given)
    working = 4 * 10 * weight.numel()
    # Weights that become codes, and the errors of 128 columns.
    held = working * (1 + 128 / IN)
    assert held < most < 1.2 * held + 8 * weight.numel() + 16 * IN**2


def test_a_factor():
    moment = statistics(width=512, height=8).second_moment
    most = most_alive(lambda: inverse_cholesky(moment, 0.01), moment)
    # Lower triangle and its inverse in float64, and two products of halves of them.
    assert 18 < most / 512**2 <= 20.1
