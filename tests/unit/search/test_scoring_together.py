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
EITHER = Family("gptq", None, static_groups=True, samples=8)
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


def test_mixtures_of_either_grid_are_no_worse_than_those_of_one(compose):
    composer = compose("either")
    one_grid = [
        Family("gptq", symmetric, static_groups=True, samples=8) for symmetric in (True, False)
    ]
    smallest, largest = composer.smallest_and_largest()
    gained = False
    for share in (0.2, 0.4, 0.6, 0.8):
        limit = int(smallest.total_bytes + share * (largest.total_bytes - smallest.total_bytes))
        either = composer.mixture(EITHER, limit)
        others = [composer.mixture(family, limit, or_smallest=True) for family in one_grid]
        fitting = [other.predicted_kl for other in others if other.size_bytes <= limit]
        # The header's offsets have a few digits more or fewer: a hair of the budget.
        assert either.predicted_kl <= min(fitting) * 1.001
        grids = {scheme.symmetric for scheme in either.assignment.values()}
        gained |= either.predicted_kl < 0.99 * min(fitting) and {True, False} <= grids
    assert gained, "int8 is symmetric here, and asymmetric int4 the better one"


def test_uniform_candidates_of_either_grid_are_those_of_both(compose):
    composer = compose("uniforms")
    found = composer.uniforms(EITHER)
    assert {candidate.name for candidate in found} == set(NAMES)
    assert all(candidate.family.symmetric is not None for candidate in found)
    assert [c.size_bytes for c in found] == sorted(c.size_bytes for c in found)
