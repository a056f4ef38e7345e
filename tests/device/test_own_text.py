"""A model writes text on an accelerator: the same as on the CPU, with room for all of it or not."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration import drafts, own_text
from advisor.calibration.drafts import Draft
from advisor.calibration.own_text import write, written_by
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


def test_a_stopped_text_goes_on_there_too(llama_builder, simulated, monkeypatch, tmp_path):
    monkeypatch.setattr(drafts, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(own_text, "device_memory", lambda _: (80 * 10**9,) * 2)
    monkeypatch.setattr(own_text, "device_name", str)
    folder = llama_builder()
    expected = write(load_model(folder), sequences=3, sequence_length=80, seed=0)
    loaded = load_model(folder, device="cuda:0")

    def stop(done, _total):
        if done == 3 * 70:  # in the second piece
            raise KeyboardInterrupt

    draft = Draft(tmp_path / "draft", written_by(loaded))
    with pytest.raises(KeyboardInterrupt):
        write(loaded, sequences=3, sequence_length=80, seed=0, draft=draft, progress=stop)
    draft, seen = Draft(tmp_path / "draft", written_by(loaded)), []
    found = write(
        loaded, sequences=3, sequence_length=80, seed=0, draft=draft,
        progress=lambda done, _: seen.append(done),
    )  # fmt: skip
    assert seen[0] == 3 * 71
    assert torch.equal(found, expected)
