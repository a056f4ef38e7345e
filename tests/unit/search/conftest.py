"""Statistics of a random model that tests of the search share."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens


@pytest.fixture
def store(random_llama, tmp_path):
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    sequences = TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))
    found = open_store(random_llama, sequences, root=tmp_path)
    collect_statistics(random_llama, sequences, found)
    return found
