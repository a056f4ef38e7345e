"""Logits of a large vocabulary: what is there at once does not grow with the tokens."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.models.blocks import head_tokens, rows_at_once
from advisor.models.load import load_model

VOCABULARY = 40_000
LENGTH = 384


class LiveLogits(TorchDispatchMode):
    """Counts the bytes of the tensors over the vocabulary that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == VOCABULARY:
                self._add(value.untyped_storage())
        return found

    def _add(self, storage):
        key = storage._cdata
        if key not in self._live:
            self._live[key] = storage.nbytes()
            weakref.finalize(storage, self._live.pop, key, None)
            self.peak = max(self.peak, sum(self._live.values()))


@pytest.fixture
def loaded(llama_builder):
    return load_model(llama_builder("wide", vocab_size=VOCABULARY, max_position_embeddings=LENGTH))


def sequences(count):
    tokens = torch.randint(2, 300, (count, LENGTH), generator=torch.Generator().manual_seed(count))
    return TokenSequences(tokens, "random", "0" * 64, 0, hash_tokens(tokens))


def allowed(copies):
    """A few copies of the logits that go through the head at once, and of a few rows."""
    rows = 12 * (rows_at_once(VOCABULARY) + 1)  # some of them in float64
    return 4 * VOCABULARY * (copies * head_tokens(VOCABULARY) + rows)


@pytest.mark.parametrize("count", [1, 3])
def test_evaluation_holds_the_logits_of_a_few_tokens(loaded, tmp_path, count):
    text = sequences(count)
    with LiveLogits() as live:
        reference = Reference.compute(loaded, text, tmp_path)
        measured = measure(loaded.model, reference)
    assert measured.sequences == count
    assert 4 * VOCABULARY * rows_at_once(VOCABULARY) < live.peak <= allowed(1)
    assert allowed(1) < 4 * VOCABULARY * LENGTH  # less than one sequence has


@pytest.mark.parametrize("count", [1, 3])
def test_statistics_hold_the_logits_of_a_few_tokens(loaded, tmp_path, count):
    text = sequences(count)
    assert allowed(1) < 4 * VOCABULARY * LENGTH
    store = open_store(loaded, text, root=tmp_path)
    with LiveLogits() as live:
        collect_statistics(loaded, text, store)
    assert store.complete
    assert 4 * VOCABULARY * rows_at_once(VOCABULARY) < live.peak <= allowed(1)
