"""Memory that goes back to the system, and what must not be lost on the way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from advisor.calibration.spill import Spill
from advisor.models import allocator, casting
from advisor.models.allocator import drop_pages, give_back
from advisor.models.blocks import head_tokens
from advisor.models.load import load_model

needs_glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or allocator._library() is None, reason="needs glibc"
)


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@needs_glibc
def test_hidden_states_that_left_memory_are_still_in_their_file(tmp_path):
    spill = Spill(tmp_path, "states", (32, 1024, 256), torch.float32)
    states = spill.create()
    values = torch.arange(32 * 1024 * 256, dtype=torch.float32).view(32, 1024, 256)
    states.copy_(values)
    before = resident("RssShmem") + resident("RssFile")
    drop_pages(states[4:16], states[16:28])
    # 24 MiB; the kernel counts in batches, and code that runs first now is mapped meanwhile.
    assert resident("RssShmem") + resident("RssFile") < before - 18 * 2**20
    assert torch.equal(states, values)
    spill.publish()
    assert torch.equal(spill.open(), values)


@needs_glibc
def test_the_heap_is_given_back():
    allocator.map_large_tensors()
    # Each second one stays, so that the heap cannot shrink from its end.
    parts = [torch.ones(250_000) for _ in range(100)]
    kept = parts[::2]
    del parts
    before = resident("RssAnon")
    give_back()
    assert resident("RssAnon") < before - 30 * 2**20
    assert all(bool((part == 1).all()) for part in kept)


def test_a_large_tensor_is_cast_in_parts_to_the_same_bits(llama_builder, monkeypatch):
    folder = llama_builder()
    path = folder / "model.safetensors"
    tensors = {name: value.bfloat16() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = load_model(folder)
    assert not loaded.not_mapped
    name = "model.embed_tokens.weight"
    parameter = loaded.model.get_parameter(name)
    monkeypatch.setattr(casting, "_CAST_AT_ONCE", 1000)
    assert parameter.numel() % 1000
    value = loaded.tensor(name)
    assert value.dtype == torch.float32
    assert torch.equal(value, parameter.detach().float())


def test_logits_of_few_tokens_at_once():
    assert [head_tokens(v) for v in (300, 32_000, 49_152, 128_256, 262_144, 10**6)] == [
        256, 256, 128, 64, 32, 32,
    ]  # fmt: skip
