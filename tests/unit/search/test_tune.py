"""The whole search on a tiny random model: plan, resume, stop, infeasible budgets."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import torch

from advisor.budgets import Budgets, loosened
from advisor.calibration.collect import open_store
from advisor.calibration.tokens import TokenSequences, hash_tokens
from advisor.engines.options import MixtureOptions
from advisor.errors import InputError
from advisor.evaluation.measure import measure
from advisor.evaluation.reference import Reference
from advisor.evaluation.runtime import quantized_model
from advisor.hardware.catalogue import find_profile
from advisor.models.load import load_model
from advisor.plan.files import dump_plan
from advisor.plan.folders import cache_root
from advisor.predict.models import load_modelspec
from advisor.report.sections import texts_and_search
from advisor.schemes import parse_scheme
from advisor.search.assignment import assignment_of, samples_of, settings_of
from advisor.search.effort import QUICK
from advisor.search.offers import best_of_kinds, uniform_offers
from advisor.search.opening import opened
from advisor.search.realise import realise
from advisor.search.tune import tune

OPTIONS = MixtureOptions(
    "compressed-tensors",
    tuple(
        map(
            parse_scheme,
            ("gptq-int4-g32-sym", "gptq-int4-g64-sym", "gptq-int8-g32-sym", "bf16"),
        )
    ),
)


def _sequences(seed: int, count: int, length: int = 32) -> TokenSequences:
    tokens = torch.randint(2, 300, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenSequences(tokens, f"random:{seed}", str(seed) * 8, seed, hash_tokens(tokens))


@pytest.fixture(scope="module")
def model(random_llama_folder):
    return load_model(random_llama_folder), load_modelspec(str(random_llama_folder))


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(model, shared_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(shared_cache))
    loaded, spec = model

    def call(budgets: Budgets, *, workdir="work", **changes):
        arguments = {
            "calibration": _sequences(1, 16),
            "evaluation": _sequences(2, 8),
            "workdir": tmp_path / workdir,
            "trials": 12,
            "context": 64,
            "options": OPTIONS,
            "engine": "vllm",
        } | changes
        engine = arguments.pop("engine")
        return tune(loaded, spec, find_profile("rtx-4090"), engine, budgets, **arguments)

    return call


def _middle(spec) -> int:
    """A size between uniform int4 g32 and int8."""
    from advisor.predict.size import checkpoint_size

    sizes = [
        checkpoint_size(spec, parse_scheme(name), "compressed-tensors").total_bytes
        for name in ("gptq-int4-g32-sym", "gptq-int8-g32-sym")
    ]
    return sum(sizes) // 2


def test_size_budget_gives_a_mixture_no_worse_than_any_measured_uniform(run, model):
    result = run(Budgets(max_size_bytes=_middle(model[1])))
    uniform = [f for f in result.finalists if f.mixture.is_uniform]
    assert result.feasible
    assert uniform, "the best uniform candidate is always measured"
    expected = result.plan.expected
    assert expected.basis == "measured"
    assert expected.size_bytes <= _middle(model[1])
    assert expected.kl.value <= min(f.measured_kl for f in uniform)
    assert len(result.trials) == 12
    assert result.plan.search.stopped == "completed"


def test_a_quick_search_measures_one_mixture_and_one_uniform_candidate(run, model):
    budgets = Budgets(max_size_bytes=_middle(model[1]))
    quick, full = run(budgets, effort=QUICK, workdir="quick"), run(budgets)
    assert sorted(f.mixture.is_uniform for f in quick.finalists) == [False, True]
    assert not any(f.mixture.family.sequential for f in quick.finalists)
    families = [record.attributes["family"] for record in quick.trials if record.value]
    assert {family["method"] for family in families} == {"gptq"}
    assert len({family["damping"] for family in families}) == 1
    assert {family["clip"] for family in families} == {"none", "mse"}, "a shallow model"
    assert quick.plan.settings["descent"] == 0
    assert quick.plan.settings["output_feedback"] == full.plan.settings["output_feedback"]
    assert (quick.plan.search.effort, full.plan.search.effort) == ("quick", "full")
    assert quick.plan.search.study != full.plan.search.study
    assert len(quick.finalists) < len(full.finalists)
    expected = [f.measured_kl for f in quick.finalists if f.mixture.is_uniform]
    assert quick.plan.expected.kl.value <= min(expected)


def test_methods_that_a_few_blocks_rule_out_are_not_searched_and_the_plan_says_so(
    run, model, monkeypatch
):
    reasons = {"rtn": "rtn is far off", "awq": "awq is far off", "best": "none comes near gptq"}
    monkeypatch.setattr("advisor.search.run.methods_far_behind", lambda *_: reasons)
    result = run(Budgets(max_size_bytes=_middle(model[1])))
    assert len(result.trials) == 12
    assert {record.attributes["family"]["method"] for record in result.trials if record.value} == {
        "gptq"
    }
    assert result.plan.search.passed_over == tuple(reasons.values())
    rows = dict(texts_and_search(result.plan))
    assert rows["not searched"] == "rtn is far off; awq is far off; none comes near gptq"


def test_plan_realises_to_the_codes_that_were_measured(run, model):
    loaded, spec = model
    result = run(Budgets(max_size_bytes=_middle(spec)))
    assignment = assignment_of(result.plan, loaded.linears)
    expected = result.plan.expected
    chosen = next(f for f in result.finalists if f.measurement.kl == expected.kl)
    assert assignment == dict(chosen.mixture.assignment)
    settings = settings_of(result.plan)
    assert settings.sequential == chosen.mixture.family.sequential
    realised = realise(
        loaded, assignment, settings, open_store(loaded, _sequences(1, 16)),
        samples=samples_of(result.plan), calibration=_sequences(1, 16),
    )  # fmt: skip
    assert realised.weights.keys() == {n for n, s in assignment.items() if s.is_quantized}
    reference = Reference.compute(loaded, _sequences(2, 8), cache_root())
    with quantized_model(loaded.model, realised.weights, realised.replaced) as quantized:
        assert measure(quantized, reference).kl == expected.kl


def test_the_mix_of_sources_is_searched_and_stands_in_the_plan(run, model):
    spec = model[1]
    sources = ("a", "b") * 8
    calibration = replace(_sequences(1, 16), sources=sources)
    result = run(Budgets(max_size_bytes=_middle(spec)), calibration=calibration, trials=20)
    tried = {record.attributes["family"]["mix"] for record in result.trials if record.attributes}
    assert tried == {"given", "only a", "only b"}
    plan = result.plan
    chosen = next(f for f in result.finalists if f.measurement.kl == plan.expected.kl)
    assert plan.settings["calibration_mix"] == chosen.mixture.family.mix
    assert settings_of(plan).calibration_mix == chosen.mixture.family.mix
    best = {}
    for finalist in result.finalists:
        best.setdefault(finalist.mixture.family.mix, finalist)
    for mix, finalist in best.items():
        assert ("calibrated on" in finalist.mixture.family.describe()) == (mix != "given")


def test_sequential_codes_are_measured_beside_the_plain_ones(run, model):
    budgets = Budgets(max_size_bytes=_middle(model[1]))
    result = run(budgets)
    named = [f for f in result.finalists if f.mixture.family.sequential]
    assert len(named) == 1
    (same,) = [
        f
        for f in result.finalists
        if f.mixture.assignment == named[0].mixture.assignment and f is not named[0]
    ]
    assert named[0].measured_kl != same.measured_kl
    assert result.plan.expected.kl.value <= min(same.measured_kl, named[0].measured_kl)
    won = result.plan.expected.kl.value == named[0].measured_kl
    assert result.plan.settings["sequential"] is won
    beaten = [row for row in result.plan.runners_up if ", sequential, " in row.reason]
    assert len(beaten) == (0 if won else 1)
    without = run(budgets, workdir="plain", sequential=False)
    assert not any(f.mixture.family.sequential for f in without.finalists)
    assert without.plan.settings["sequential"] is False


def test_sequential_codes_never_make_the_smallest_larger(run):
    plain = run(Budgets(max_kl=0.05), workdir="plain", sequential=False)
    refined = run(Budgets(max_kl=0.05))
    assert refined.feasible
    assert refined.plan.expected.size_bytes <= plain.plan.expected.size_bytes
    assert any(f.mixture.family.sequential for f in refined.finalists)


def test_same_seed_same_plan_and_resume_keeps_trials(run, model):
    budgets = Budgets(max_size_bytes=_middle(model[1]))
    whole = run(budgets, workdir="a")
    part = run(budgets, workdir="b", trials=5)
    assert len(part.trials) == 5
    resumed = run(budgets, workdir="b")
    assert [t.parameters for t in resumed.trials] == [t.parameters for t in whole.trials]
    assert [t.value for t in resumed.trials] == [t.value for t in whole.trials]
    assert dump_plan(resumed.plan) == dump_plan(whole.plan)


def test_loss_budget_alone_gives_the_smallest_that_passes(run):
    result = run(Budgets(max_kl=0.05))
    passing = [f for f in result.finalists if f.passes]
    assert result.feasible
    assert result.plan.expected.kl.high <= 0.05
    assert result.plan.expected.size_bytes == min(f.mixture.size_bytes for f in passing)
    assert any(f.mixture.is_uniform for f in result.finalists)


def test_budgets_that_cannot_be_met_say_what_would(run):
    result = run(Budgets(max_size_bytes=20_000, max_kl=1e-4))
    assert not result.feasible
    alone, both = result.relaxation
    assert (alone.budget, alone.also) == ("max_size", ())
    assert alone.needed > both.needed > 20_000
    needed = [f for f in result.finalists if f.mixture.size_bytes <= alone.needed]
    assert any(f.passes and f.name == alone.candidate for f in needed)
    assert max(f.mixture.size_bytes for f in needed) > 0.99 * alone.needed
    # Nothing is as small as 20 kB: the quality must give way too, by as little as was measured.
    smaller = [f for f in needed if not f.passes]
    asked = [f.mixture.size_bytes / 20_000 * f.kl_high / 1e-4 for f in smaller if f.in_full]
    nearest = [f for f in smaller if f.in_full][asked.index(min(asked))]
    assert both.candidate == nearest.name
    assert both.needed == loosened("max_size", nearest.mixture.size_bytes)
    size = f"--max-size {both.needed / 1000:g}kB instead of 20 kB"
    assert both.text.startswith(f"{size} and --max-kl ")
    assert [change.budget for change in both.also] == ["max_kl"]
    assert both.also[0].needed > both.also[0].limit == 1e-4
    assert both.to_dict()["also"] == [both.also[0].to_dict()]


def test_what_one_candidate_needs_is_asked_for_together(run, model):
    size = _middle(model[1])
    result = run(Budgets(max_size_bytes=size, max_loss=1e-9, max_kl=1e-9))
    assert re.search(r"(loss|KL) \S+ \(.* to .*\) exceeds 0", result.plan.unmet)
    quality = [change for change in result.relaxation if change.budget != "max_size"]
    assert [(c.budget, [more.budget for more in c.also]) for c in quality] == [
        ("max_loss", ["max_kl"])
    ]
    within = [f for f in result.finalists if f.mixture.size_bytes <= size and f.in_full]
    assert any(
        f.loss_high <= quality[0].needed and f.kl_high <= quality[0].also[0].needed for f in within
    )


def test_a_budget_on_memory_is_relaxed_as_memory(run):
    result = run(Budgets(max_memory_bytes=1000))
    assert not result.feasible
    assert "bytes more than the budgets on size, memory and speed leave" in result.plan.unmet
    assert [(change.budget, change.limit) for change in result.relaxation] == [("max_memory", 1000)]
    assert result.relaxation[0].needed >= result.plan.expected.memory_bytes > 1000
    assert result.relaxation[0].text.startswith("--max-memory ")


def test_a_database_that_cannot_be_opened_is_refused_before_any_work(run, tmp_path):
    stages = []
    with pytest.raises(InputError, match=r"--storage must be a database.*unable to open"):
        run(
            Budgets(max_loss=0.02), storage=f"sqlite:///{tmp_path}/nowhere/study.db",
            progress=lambda event: stages.append(event.stage),
        )  # fmt: skip
    assert set(stages) == {"Memory", "Disk"}


def test_a_database_without_its_driver_says_what_to_install():
    def opening():
        try:
            raise ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2")
        except ModuleNotFoundError as error:
            raise RuntimeError("failed to import") from error

    with pytest.raises(InputError, match=r"'psycopg2' \(pip install psycopg2-binary\)"):
        opened("postgresql://user:secret@host/db", opening)


@pytest.mark.parametrize("stage", ["Statistics", "Trials", "Reference", "Finalist 1"])
def test_interrupt_before_anything_is_measured_gives_no_answer(
    run, model, stage, tmp_path, monkeypatch
):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "own"))
    with pytest.raises(KeyboardInterrupt, match=r"before any candidate was measured.*goes on"):
        run(Budgets(max_size_bytes=_middle(model[1])), progress=_interrupting(stage))


def test_interrupt_later_leaves_the_best_so_far(run, model):
    result = run(Budgets(max_size_bytes=_middle(model[1])), progress=_interrupting("Finalist 2"))
    assert result.plan.search.stopped == "interrupted"
    assert [f.name for f in result.finalists] == [result.answer.name] == [result.plan.scheme.name]
    assert result.plan.expected.basis == "measured"
    assert result.plan.expected.size_bytes <= _middle(model[1])


def _interrupting(stage):
    def interrupt(event):
        if event.stage.startswith(stage) and event.done:
            raise KeyboardInterrupt

    return interrupt


def test_time_budget_still_measures_a_mixture_and_a_uniform(run, model, tmp_path, monkeypatch):
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "own"))  # nothing is scored in it
    result = run(Budgets(max_size_bytes=_middle(model[1])), time_budget_s=0.0)
    assert result.plan.search.stopped == "time budget"
    assert result.trials == ()
    assert {f.mixture.is_uniform for f in result.finalists} == {True, False}
    assert any(
        not f.mixture.is_uniform and f.mixture.family.method == "gptq" for f in result.finalists
    )


def test_trials_of_another_machine_are_measured_here(run, model, tmp_path, monkeypatch):
    budgets = Budgets(max_size_bytes=_middle(model[1]))
    there = run(budgets)
    monkeypatch.setenv("ADVISOR_CACHE", str(tmp_path / "own"))
    shutil.rmtree(tmp_path / "work" / "finalists")
    here = run(budgets)
    assert [trial.parameters for trial in here.trials] == [t.parameters for t in there.trials]
    assert {f.mixture.is_uniform for f in here.finalists} == {True, False}


def test_damaged_measurement_is_made_again(run, model, tmp_path):
    budgets = Budgets(max_size_bytes=_middle(model[1]))
    first = run(budgets)
    for path in (tmp_path / "work" / "finalists").glob("*.json"):
        path.write_text("{")
    second = run(budgets)
    assert second.plan.expected.kl == first.plan.expected.kl


def test_uniform_candidates_that_no_mixture_holds_are_measured(run, model):
    loaded, spec = model
    rtx = find_profile("rtx-4090")
    offers = uniform_offers(spec, loaded.linears, rtx, "vllm", OPTIONS)
    formats = {mixture.name: mixture.format_name for mixture in offers}
    assert formats["rtn-int8-gch-sym-aint8"] == "compressed-tensors"
    assert "bnb-nf4" not in formats, "vLLM 0.32 reads none"
    older = {m.name for m in uniform_offers(spec, loaded.linears, rtx, "vllm==0.27", OPTIONS)}
    assert older - set(formats) >= {"bnb-nf4", "llm.int8"}
    assert formats["smoothquant-int8-gch-sym-aint8"] == "compressed-tensors"
    assert formats["rtn-fp8-gch-afp8-static"] == "compressed-tensors"
    assert "gptq-int4-g128-sym" not in formats
    assert "hqq-int4-g64-asym" not in formats, "no engine reads HQQ's checkpoints"
    most = max(mixture.size_bytes for mixture in offers)
    kinds = [
        (s.method, s.activation, s.static_activation)
        for mixture in best_of_kinds(offers, most)
        for s in set(mixture.assignment.values())
    ]
    assert len(set(kinds)) == len(kinds) > 2
    assert best_of_kinds(offers, 1) == []
    result = run(Budgets(max_size_bytes=most))
    measured = {f.name for f in result.finalists}
    assert {"smoothquant-int8-gch-sym-aint8"} <= measured
    assert result.plan.expected.kl.value <= min(f.measured_kl for f in result.finalists) * 1.5


def test_answer_of_another_format_is_planned_in_it(run, model):
    loaded, spec = model
    offers = uniform_offers(spec, loaded.linears, find_profile("rtx-4090"), "transformers", OPTIONS)
    nf4 = next(mixture for mixture in offers if mixture.name == "bnb-nf4")
    only = MixtureOptions("compressed-tensors", (parse_scheme("gptq-int8-g32-sym"),))
    result = run(Budgets(max_size_bytes=nf4.size_bytes), options=only, engine="transformers")
    assert result.feasible, "nothing else is as small"
    assert result.plan.scheme.name == "bnb-nf4"
    assert result.plan.scheme.format == "bitsandbytes"
    assert result.plan.engine.kernel.support in ("native", "weight-only")
