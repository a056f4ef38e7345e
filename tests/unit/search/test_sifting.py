"""What a look at a few blocks rules out, and that it is not paid twice."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from advisor.engines.options import MixtureOptions
from advisor.methods.settings import QuantizationSettings
from advisor.predict.models import load_modelspec
from advisor.schemes import parse_scheme
from advisor.search import scores, sifting
from advisor.search.compose import Composer
from advisor.search.families import Family
from advisor.search.score import Score
from advisor.search.scores import ScoreBook
from advisor.search.sifting import methods_far_behind, sample_of, times_the_least, without
from advisor.search.space import Space, usual_families
from advisor.search.trials import Scorer, scoring_allowance

FAMILIES = [Family(method, True) for method in ("rtn", "gptq", "awq", "best")]
STORAGES = ("int4-g32-sym", "int4-g64-sym", "int8-gch-sym")


def linears(blocks):
    return tuple(SimpleNamespace(block=block, name=f"m{block}") for block in range(blocks))


class FakeComposer:
    """Of 24 blocks; KL of a module by method, and by storage where that matters."""

    settings = QuantizationSettings()
    linears = linears(24)

    def __init__(self, kl, uneven=(), by_damping=None):
        self.kl, self.uneven, self.asked, self.book = kl, uneven, [], self
        self.by_damping = by_damping or {}

    def schemes(self, family):
        return tuple(parse_scheme(f"{family.method}-{storage}") for storage in STORAGES)

    def score_together(self, families, progress=None, *, sampled):
        self.asked.append(([family.method for family in families], sampled))

    def scores(self, schemes, settings, samples, *, sampled):
        assert sampled
        found = {}
        for scheme in schemes:
            kl = self.kl[scheme.method]
            kl = kl.get(scheme.group_size, 1.0) if isinstance(kl, dict) else kl
            kl *= self.by_damping.get(settings.damping, 1.0)
            names = ["m3"] if scheme.group_size in self.uneven else ["m3", "m9", "m15", "m21"]
            found[scheme] = {name: Score(kl, kl) for name in names}
        return found


@pytest.mark.parametrize(
    ("kl", "behind"),
    [
        ({"gptq": 1.0, "awq": 1.6, "rtn": 3.0}, {"awq", "rtn", "best"}),
        ({"gptq": 1.0, "awq": 1.4, "rtn": 3.0}, {"rtn"}),
        # near in one of three storages
        ({"gptq": 1.0, "awq": {32: 2.0, 64: 1.3, -1: 2.0}, "rtn": 3.0}, {"rtn"}),
        # too little text for GPTQ
        ({"gptq": 5.0, "awq": 1.0, "rtn": 1.2}, {"gptq"}),
        ({"gptq": 0.0, "awq": 0.0, "rtn": 0.0}, set()),
    ],
)
def test_methods_that_are_nowhere_near_the_best_are_named(kl, behind):
    composer = FakeComposer(kl)
    found = methods_far_behind(composer, FAMILIES, None)
    assert set(found) == behind
    assert composer.asked == [(["gptq", "rtn", "awq"], True)]
    if "awq" in behind:
        assert found["awq"] == "awq has 1.6 times the least KL or more, on 4 of 24 blocks"
        assert found["best"] == "no other method comes near gptq, on 4 of 24 blocks"


def test_storages_of_few_modules_say_nothing():
    kl = {"gptq": 1.0, "awq": {32: 1.1}, "rtn": 3.0}
    assert "awq" not in methods_far_behind(FakeComposer(kl | {"awq": 1.1}), FAMILIES, None)
    kl["awq"] = {32: 1.1, 64: 2.0, -1: 2.0}
    assert "awq" in methods_far_behind(FakeComposer(kl, uneven={32}), FAMILIES, None)


def test_one_method_or_a_shallow_model_is_not_looked_at():
    composer = FakeComposer({"gptq": 1.0, "rtn": 9.0})
    assert methods_far_behind(composer, [Family("gptq", True)], None) == {}
    composer.linears = linears(9)
    assert methods_far_behind(composer, FAMILIES, None) == {}
    assert composer.asked == []
    assert sample_of(linears(30)) == (3, 9, 15, 21, 27)
    assert sample_of(linears(9)) == ()


def test_times_the_least_is_where_a_method_comes_nearest():
    found = times_the_least({"a": {"x": 2.0, "y": 9.0}, "b": {"x": 1.0, "y": 3.0}, "c": {"z": 1.0}})
    assert found == {"a": 2.0, "b": 1.0, "c": 1.0}


def scorer_of(composer, allowance=8.0):
    usual = Family("gptq", True)
    found = Scorer(composer, None, None, allowance, lambda family, done, total: None, usual=[usual])
    found.scored.append(usual)
    return found


def test_a_family_is_scored_where_a_look_says_that_it_is_better():
    scorer = scorer_of(FakeComposer({"gptq": 1.0}, by_damping={0.5: 0.9, 0.05: 0.98}))
    better, hardly = Family("gptq", True, damping=0.5), Family("gptq", True, damping=0.05)
    assert scorer._affordable(better) == better
    assert scorer._affordable(hardly) == scorer.usual[0]
    assert list(scorer.passed) == [hardly]
    looks = len(scorer.composer.asked)
    assert scorer._affordable(hardly) == scorer.usual[0]
    assert len(scorer.composer.asked) == looks == 2


def test_looks_take_their_share_of_the_allowance_and_no_more():
    """Two units are spent; a look at four of 24 blocks takes a third of a unit."""
    scorer = scorer_of(FakeComposer({"gptq": 1.0}), allowance=2.7)
    for damping in (0.05, 0.5, 0.7):
        scorer._affordable(Family("gptq", True, damping=damping))
    assert [family.damping for family in scorer.passed] == [0.05, 0.5]


def test_a_study_that_goes_on_remembers_its_looks():
    scorer, again = (scorer_of(FakeComposer({"gptq": 1.0})) for _ in range(2))
    family = Family("gptq", True, damping=0.5)
    scorer._affordable(family)
    assert scorer.passed == {family: None}
    again.recall([SimpleNamespace(attributes={"passed": family.to_dict()})])
    assert again.passed == scorer.passed


def test_a_shallow_models_families_are_scored_without_a_look():
    composer = FakeComposer({"gptq": 1.0})
    composer.linears = linears(9)
    family = Family("gptq", True, damping=0.5)
    assert scorer_of(composer)._affordable(family) == family
    assert composer.asked == []


@pytest.fixture
def compose(random_llama, random_llama_folder, store, tmp_path, monkeypatch):
    sample = (random_llama.linears[-1].block,)
    monkeypatch.setattr(scores, "sample_of", lambda linears: sample)
    monkeypatch.setattr(sifting, "sample_of", lambda linears: sample)

    def make(name):
        book = ScoreBook(random_llama, store, tmp_path / name)
        names = ("gptq-int4-g32-sym", "gptq-int8-gch-sym")
        offered = MixtureOptions("compressed-tensors", tuple(map(parse_scheme, names)))
        spec = load_modelspec(str(random_llama_folder))
        settings = QuantizationSettings(scale_steps=4)
        return Composer(spec, random_llama.linears, offered, book, settings)

    return make


def test_what_was_looked_at_is_not_scored_again(compose, random_llama, monkeypatch):
    walked: list[str] = []
    plain = ScoreBook._score_group

    def counted(self, members, found, *rest):
        walked.extend(f"{member.name} {scheme}" for member in members for scheme in found)
        plain(self, members, found, *rest)

    monkeypatch.setattr(ScoreBook, "_score_group", counted)
    family = Family("gptq", True, static_groups=True, samples=8)
    first = compose("first")
    first.score_together([family], sampled=True)
    looked = list(walked)
    assert looked
    assert {name.split()[0] for name in looked} < {linear.name for linear in random_llama.linears}
    assert not first.is_scored(family)
    walked.clear()
    found = compose("first").groups(family)  # as after a kill: from the disk
    assert walked
    assert set(walked).isdisjoint(looked)
    assert found == compose("whole").groups(family)
    walked.clear()
    whole = compose("first")  # and what is scored needs no look
    scores_of = whole.book.scores(whole.schemes(family), family.settings(whole.settings), 8,
                                  sampled=True)  # fmt: skip
    assert not walked
    names = {name.split()[0] for name in looked}
    assert all(set(own) == names for scheme, own in scores_of.items() if scheme.is_quantized)


def test_a_space_without_a_method_leaves_what_it_would_have_cost_unspent():
    space = Space(("rtn", "gptq", "awq", "best"), {True: ("int4-g32",)}, ("none",), (0.15,), False,
                  (8,), 4.0, 8.0)  # fmt: skip
    left = without(space, {"rtn": "why", "awq": "why", "best": "why"})
    assert left == replace(space, methods=("gptq",))
    assert [family.method for family in usual_families(left)] == ["gptq"]
    assert without(space, {}) == space
    assert scoring_allowance(10**8) - scoring_allowance(10**8, 0, ("rtn", "awq", "best")) == 3
