"""The simulated device itself: it refuses what torch refuses on CUDA, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch
from simulated_device import SimulatedDevice
from torch import nn

MIXED = "Expected all tensors to be on the same device"


def test_tensors_are_where_they_are_put(simulated):
    there = torch.zeros(3, device="cuda:0")
    assert there.device == torch.device("cuda:0")
    assert there.is_cuda
    assert torch.zeros(3).device.type == "cpu"
    assert torch.zeros_like(there).device == there.device
    assert there.new_ones(2).device == there.device
    assert torch.ones(2).to(there).device == there.device
    assert torch.arange(3, device=there.device)[1:].view(1, 2).is_cuda
    assert there.cpu().device.type == "cpu"
    assert there.cpu() is not there
    assert torch.ones_like(there, device="cpu").is_cpu
    assert torch.tensor([1.0], device=there.device).is_cuda


def test_operations_do_not_mix_devices(simulated):
    here, there = torch.ones(3), torch.ones(3, device="cuda:0")
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: torch.where(there > 0, there, here),
        lambda: there.add_(here),
        lambda: torch.mul(there, there, out=here),
        lambda: there.view(1, 3) @ here.view(3, 1),
    ):
        with pytest.raises(RuntimeError, match=MIXED):
            mixed()
    assert (there * 2.0).is_cuda
    assert (there * torch.tensor(2.0)).is_cuda  # numbers may come along
    with pytest.raises(RuntimeError, match=MIXED):
        torch.tensor(2.0).add_(there.sum())


def test_copies_go_between_devices_and_numbers_come_back(simulated):
    here, there = torch.zeros(3), torch.full((3,), 5.0, device="cuda:0")
    here[1:] = there[1:]
    assert here.tolist() == [0.0, 5.0, 5.0]
    assert here.is_cpu
    assert float(there.sum()) == 15.0
    assert there.tolist() == [5.0, 5.0, 5.0]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        there.numpy()


def test_indices_may_stay_behind(simulated):
    here, there = torch.arange(4.0), torch.arange(4.0, device="cuda:0")
    places = torch.tensor([2, 0])
    assert there[places].tolist() == [2.0, 0.0]
    there[places] = there[places] + 1
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        here[places.to("cuda:0")]


def test_modules_move_and_learn_there(simulated):
    layer = nn.Linear(4, 2).to("cuda:0")
    assert layer.weight.device == simulated.device
    with pytest.raises(RuntimeError, match=MIXED):
        layer(torch.ones(3, 4))
    layer(torch.ones(3, 4, device="cuda:0")).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert layer.weight.grad.shape == (2, 4)
    attention = nn.functional.scaled_dot_product_attention
    rows = torch.randn(1, 2, 5, 8, device="cuda:0", requires_grad=True)
    (gradient,) = torch.autograd.grad(attention(rows, rows, rows, is_causal=True).sum(), rows)
    assert gradient.is_cuda


def test_linear_algebra_stays_there(simulated):
    matrix = torch.eye(4, dtype=torch.float64, device="cuda:0") * 4
    assert torch.linalg.cholesky(matrix).is_cuda
    assert torch.linalg.solve(matrix, matrix).is_cuda
    with pytest.raises(RuntimeError, match="not implemented"):
        matrix.long() @ matrix.long()


def test_a_parameters_data_may_move(simulated):
    parameter = nn.Parameter(torch.ones(3), requires_grad=False)
    stored = parameter.data
    parameter.data = stored.to("cuda:0")
    assert parameter.is_cuda
    parameter.data = stored
    assert parameter.is_cpu


def test_memory_is_counted_and_ends():
    with SimulatedDevice(capacity=4000) as device:
        first = torch.zeros(500, device="cuda:0")
        assert device.used == 2000
        view = first[1:]
        del first
        gc.collect()
        assert device.used == 2000  # a view keeps it
        assert (view + view).shape == (499,)
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(600, device="cuda:0")
        del view
        gc.collect()
        assert device.used == 0
        assert device.peak == 2000 + 4 * 499


def test_division_by_a_number_may_round_as_on_cuda():
    values = torch.linspace(0.1, 9.7, 1000)
    with SimulatedDevice(exact=False):
        there = values.to("cuda:0")
        apart = (there / 15.0).cpu() != values / 15.0
        by_tensor = (there / torch.full((1,), 15.0, device="cuda:0")).cpu()
    assert apart.any()
    assert torch.equal(by_tensor, values / 15.0)


def test_nothing_is_left_behind():
    with SimulatedDevice():
        kept = torch.ones(2, device="cuda:0")
    assert kept.device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device="cuda:0")
