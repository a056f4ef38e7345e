"""Host memory: predicted before a search starts, and refused where there is too little."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advisor.errors import InputError
from advisor.modelspec import LinearSpec
from advisor.predict.models import load_modelspec
from advisor.search import memory
from advisor.search.memory import MemoryUse, check_memory, needed_on_device, predicted_use


def block(index, hidden=64, inner=192):
    """One up and one down projection."""
    shapes = {"up": (hidden, inner), "down": (inner, hidden)}
    return [
        LinearSpec(
            name=f"layers.{index}.{name}", in_features=width, out_features=height, block=index,
            input_group=f"layers.{index}.{name}.input", fused_group=f"layers.{index}.{name}",
        )
        for name, (width, height) in shapes.items()
    ]  # fmt: skip


def use(linears, **changes):
    facts = {"hidden_size": 64, "vocabulary": 1000, "heads": 4, "length": 32, "prefixes": 2}
    return predicted_use(linears, **facts | changes)


def test_what_each_stage_takes():
    found = use(block(0))
    states = 4 * 64 * 8192
    assert found.head == 4 * 1000 * 64 + 4 * 1000 * 256 + states
    weights, inputs = 2 * 64 * 192, 64**2 + 192**2
    seen = 2 * (64 + 192)
    values = 12 * 1024 * (seen + 32 * 4)
    assert found.collecting == 4 * weights + values + 12 * inputs + 8 * inputs
    # Ten types at once, a code for each; the errors of 128 columns, of all where there are fewer.
    assert found.scoring == max(
        2 * 40 * 64 * 192 + 16 * 64 * 192 + 16 * 64**2 + 4 * 192**2,
        40 * 64 * 192 * 128 // 192 + 40 * 64 * 192 + 16 * 64 * 192 + 16 * 192**2 + 4 * 64**2,
    )
    fitting = 12 * inputs + 24 * 192**2
    coding = 4 * inputs + 24 * 64 * 192 + max(20 * 64**2 + 12 * 192**2, 20 * 192**2 + 12 * 64**2)
    assert found.quantizing == 8 * weights + max(fitting, coding)
    stages = (found.head, found.collecting, found.scoring, found.quantizing)
    assert found.peak == found.process + max(stages)


def test_linears_that_share_an_input_are_quantized_together():
    gate = [replace(linear, name=f"{linear.name}.gate") for linear in block(0)[:1]]
    alone, both = use(block(0)), use(gate + block(0))
    coding = 4 * (64**2 + 192**2) + 20 * 64**2 + 24 * 2 * 64 * 192 + 12 * 2 * 192**2
    assert both.quantizing == 8 * 3 * 64 * 192 + coding
    assert both.scoring - alone.scoring >= 40 * 64 * 192


def test_blocks_cost_nothing_and_weights_held_whole_do():
    one, many = use(block(0)), use([linear for index in range(9) for linear in block(index)])
    assert many == one
    held = use(block(0), weights=10**9)
    assert held.weights == 10**9
    assert held.head == one.head - 4 * 1000 * 64  # nothing is cast


@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 128_256, 262_144])
def test_logits_grow_neither_with_the_vocabulary_nor_with_the_tokens(vocabulary):
    head = use(block(0), vocabulary=vocabulary).head
    assert head - 4 * vocabulary * 64 - 4 * 64 * 8192 <= 2**25
    longer = use(block(0), vocabulary=vocabulary, length=4096)
    assert longer.head - head == 4 * 64 * (32 * 4096 - 8192)  # hidden states alone


def test_too_little_memory_is_said_in_a_line(monkeypatch):
    needed = MemoryUse(10**9, 0, 2 * 10**9, 10**9, 10**9, 10**9)
    check_memory(needed, 3 * 10**9)
    with pytest.raises(InputError, match=r"needs about 3\.00 GB .* this machine has 2\.50 GB"):
        check_memory(needed, 25 * 10**8)
    with pytest.raises(InputError, match=r"cannot be mapped 1\.00.* Save the model"):
        check_memory(replace(needed, weights=10**9), 3 * 10**9)
    facts = memory.detect_cpu()
    monkeypatch.setattr(memory, "detect_cpu", lambda: replace(facts, memory_bytes=None))
    check_memory(needed)  # nobody knows: nothing is refused


def test_an_accelerator_takes_the_stages_and_the_host_the_sums():
    here = use(block(0))
    there = replace(here, device="cuda:0")
    inputs = 64**2 + 192**2
    assert here.sums == 12 * inputs + 8 * inputs
    assert there.peak == here.process + here.sums
    assert there.stages == here.stages
    assert here.peak == here.process + here.stages
    assert f"{there.stages / 1e9:.2f} GB on cuda:0" in there.describe()


def test_an_accelerator_needs_room_for_one_block_of_any_model():
    small, large = (load_modelspec(name) for name in ("llama-3.1-8b", "llama-3.1-70b"))
    facts = {"length": 2048, "sequences": 32}
    need = needed_on_device(small, **facts)
    # All weights in 16 bits take 16 GB; in float32 a block takes 0.9 GB, the head 2.1.
    assert 5e9 < need < 16e9
    assert needed_on_device(large, **facts) < 6 * need
    assert needed_on_device(small, **facts, quantizing=False) < need
