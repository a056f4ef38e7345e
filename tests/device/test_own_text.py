"""A model writes text on an accelerator: the same as on the CPU, with room for all of it or not."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration import own_text
from advisor.calibration.own_text import write
from advisor.models.load import load_model


@pytest.mark.parametrize("free", [80 * 10**9, 100_000], ids=["whole", "by-block"])
def test_the_text_is_that_of_the_cpu(free, llama_builder, simulated, monkeypatch):
    folder = llama_builder(num_hidden_layers=6)
    expected = write(load_model(folder), sequences=3, sequence_length=24, seed=0)
    before = simulated.operations
    monkeypatch.setattr(own_text, "device_memory", lambda _: (free, free))
    loaded = load_model(folder, device="cuda:0")
    found = write(loaded, sequences=3, sequence_length=24, seed=0)
    assert simulated.operations > before + 1000
    assert found.device.type == "cpu"
    assert torch.equal(found, expected)
    blocks = sum(4 * p.numel() for p in loaded.model.model.layers.parameters())
    assert (simulated.peak > blocks) == (free > 10**9), "by block it never held them all"
    assert simulated.used < blocks / 6, "and nothing stays there"
