"""Families scored in one walk: the same scores as one by one, and nothing scored again."""

from __future__ import annotations

import pytest
import torch

from advisor.calibration.collect import collect_statistics, open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines.options import MixtureOptions
from advisor.methods.settings import QuantizationSettings
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search.compose import Composer
from advisor.search.families import Family
from advisor.search.scores import ScoreBook

NAMES = ("gptq-int4-g32-sym", "gptq-int4-g16-sym", "gptq-int4-g32-asym", "gptq-int8-gch-sym")
FAMILIES = (
    Family("gptq", True, static_groups=True, samples=8),
    Family("rtn", True),
    Family("gptq", False, static_groups=True, samples=8),
    Family("awq", True, samples=8),
    Family("best", True, static_groups=True, samples=8),
)
OTHER = Family("gptq", True, damping=0.2, samples=8)


@pytest.fixture
def store(random_llama, tmp_path):
    tokens = torch.randint(2, 300, (8, 32), generator=torch.Generator().manual_seed(0))
    sequences = TokenSequences(tokens, "random", "0" * 8, 0, hash_tokens(tokens))
    found = open_store(random_llama, sequences, root=tmp_path)
    collect_statistics(random_llama, sequences, found)
    return found


@pytest.fixture
def compose(random_llama, random_llama_folder, store, tmp_path):
    def make(name):
        book = ScoreBook(random_llama, store, tmp_path / name)
        spec = load_modelspec(str(random_llama_folder))
        offered = MixtureOptions("compressed-tensors", tuple(map(parse_scheme, NAMES)))
        settings = QuantizationSettings(scale_steps=4)
        return Composer(spec, random_llama.linears, offered, book, settings)

    return make


def test_one_walk_gives_the_scores_of_many(compose):
    together, alone = compose("together"), compose("alone")
    walks = []
    together.score_together((*FAMILIES, OTHER), lambda done, total: walks.append(done == total))
    assert walks.count(True) == 1
    assert all(together.is_scored(family) for family in FAMILIES)
    assert not together.is_scored(OTHER)  # another damping: other codes
    for family in FAMILIES:
        assert together.groups(family) == alone.groups(family)
    walks.clear()
    together.score_together(FAMILIES, lambda done, total: walks.append(True))
    assert not walks
