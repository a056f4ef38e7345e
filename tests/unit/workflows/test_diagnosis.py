"""``doctor``: what it says of GPUs."""

from __future__ import annotations

import torch

from advisor.methods import columns_in_turn
from advisor.models import device
from advisor.workflows import diagnosis
from tests.oracles import column_block


def steps_of(monkeypatch, kernels):
    monkeypatch.setattr(diagnosis, "_torch_sees_gpu", lambda: True)
    monkeypatch.setattr(device, "accelerators", lambda: [torch.device("cpu")])
    monkeypatch.setattr(columns_in_turn, "_kernels", lambda: kernels)
    return diagnosis._slow_devices()


def test_a_gpu_without_a_compiler_is_slow(monkeypatch):
    class Broken:
        @staticmethod
        def launch(*_):
            raise RuntimeError("Failed to find C compiler.\nSet CC.")

    (step,) = steps_of(monkeypatch, Broken)
    assert "slower than it could on cpu: Triton: Failed to find C compiler." in step
    assert "gcc" in step


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    class Wrong(column_block.Kernels):
        @staticmethod
        def visit(distance, products, group, *_):
            group[2].fill_(3)

    assert "computes something else" in steps_of(monkeypatch, Wrong)[0]


def test_a_gpu_with_kernels_is_fine(monkeypatch):
    assert steps_of(monkeypatch, column_block.Kernels) == []
