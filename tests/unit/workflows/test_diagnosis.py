"""``doctor``: what it says of GPUs."""

from __future__ import annotations

import torch

from advisor.methods import columns_in_turn
from advisor.models import device
from advisor.workflows import diagnosis


def steps_of(monkeypatch, *, kernels):
    monkeypatch.setattr(diagnosis, "_torch_sees_gpu", lambda: True)
    monkeypatch.setattr(device, "accelerators", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(columns_in_turn, "_kernels", lambda: kernels)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.empty(size))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.empty(size).fill_(1))
    return diagnosis._slow_devices()


def test_a_gpu_without_a_compiler_is_slow(monkeypatch):
    class Broken:
        @staticmethod
        def launch(*_):
            raise RuntimeError("Failed to find C compiler.\nSet CC.")

    (step,) = steps_of(monkeypatch, kernels=Broken)
    assert "slower than it could on cuda:0: Triton: Failed to find C compiler." in step
    assert "gcc" in step


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    class Wrong:
        @staticmethod
        def launch(*given):
            given[-1][0].fill_(7)

    assert "computes something else" in steps_of(monkeypatch, kernels=Wrong)[0]


def test_a_gpu_with_kernels_is_fine(monkeypatch):
    class Right:
        @staticmethod
        def launch(*given):
            given[-1][0].fill_(1)

    assert steps_of(monkeypatch, kernels=Right) == []
