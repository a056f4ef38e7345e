"""Families scored in one walk: the same scores as one by one, and nothing scored again."""

from __future__ import annotations

import pytest

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
