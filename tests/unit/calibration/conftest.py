"""Sequences and statistics of a random model that tests of the calibration share."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens


@pytest.fixture(scope="module")
def sequences():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 300, (6, 24), generator=generator)
    return TokenSequences(tokens, "test", "0" * 64, 0, hash_tokens(tokens))


@pytest.fixture(scope="module")
def store(random_llama, sequences, tmp_path_factory):
    root = tmp_path_factory.mktemp("store")
    store = open_store(random_llama, sequences, root=root, prefixes=[2, 3])
    collect_statistics(random_llama, sequences, store, prefixes=[2, 3])
    return store
