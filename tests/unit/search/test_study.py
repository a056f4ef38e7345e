"""The study: conditional space, reproducibility, resuming after a kill, rejected proposals."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import optuna
import pytest

from advisor.errors import InputError
from advisor.methods.settings import QuantizationSettings
from advisor.schemes import parse_scheme
from advisor.search.families import (
    Family,
    finishing_settings,
    own_settings,
    relevant_settings,
    schemes_of,
)
from advisor.search.outcomes import Outcome
from advisor.search.space import (
    Proposal,
    build_space,
    parameters_of,
    priors,
    suggest,
    usual_families,
)
from advisor.search.study import run_study
from advisor.search.trials import scoring_cost
from advisor.search.workers import storage_url

OPTIONS = tuple(
    map(
        parse_scheme,
        ("gptq-int4-g32-sym", "gptq-int4-g64-asym", "gptq-int8-gch-sym", "rtn-fp8-gch-afp8"),
    )
)
SPACE = build_space(OPTIONS[:3], (8, 16), low_bits=4.2, high_bits=6.0)


def _score(trial):
    proposal = suggest(trial, SPACE)
    if proposal.uniform == "int8-gch":
        return Outcome(math.inf, (1.0,), rejected="too large")
    bits = proposal.target_bits or 4.5
    return Outcome(bits + (proposal.family.method != "gptq"), (4.5 - bits,), {"bits": bits})


def _run(url, trials, **changes):
    arguments = {
        "name": "study", "url": url, "seed": 3, "trials": trials, "propose_and_score": _score,
        "priors": [parameters_of(proposal, SPACE) for proposal in priors(SPACE)][:6],
        "stop": lambda: False,
    }  # fmt: skip
    return run_study(**arguments | changes)


def _outcomes(records):
    return [(record.parameters, record.value, record.feasible) for record in records]


def test_interrupted_and_whole_studies_are_equal(tmp_path):
    whole = _run(storage_url(tmp_path / "whole.db", tmp_path), 24)
    url = storage_url(None, tmp_path)
    _run(url, 9)
    assert _outcomes(_run(url, 24)) == _outcomes(whole)
    assert len(whole) == 24
    assert any(record.rejected == "too large" for record in whole)


def test_another_seed_gives_other_trials(tmp_path):
    first = _run(storage_url(tmp_path / "a.db", tmp_path), 16)
    second = _run(storage_url(tmp_path / "b.db", tmp_path), 16, seed=4)
    assert _outcomes(first)[:6] == _outcomes(second)[:6], "the priors come first"
    assert _outcomes(first) != _outcomes(second)


def test_killed_process_loses_no_finished_trial_and_its_open_one_is_queued_again(tmp_path):
    url = storage_url(tmp_path / "study.db", tmp_path)
    _run(url, 4)
    script = (
        "import os, signal, sys\n"
        "from advisor.search.study import run_study\n"
        "def score(trial):\n"
        "    trial.suggest_categorical('method', ('rtn', 'gptq', 'awq', 'best'))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run_study(name='study', url={url!r}, seed=3, trials=5, propose_and_score=score,\n"
        "          priors=[], stop=lambda: False)\n"
    )
    killed = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False)
    assert killed.returncode == -9
    records = _run(url, 8)
    assert len(records) == 8
    states = [trial.state for trial in optuna.load_study(study_name="study", storage=url).trials]
    assert states.count(optuna.trial.TrialState.FAIL) == 1
    assert optuna.trial.TrialState.RUNNING not in states
    lost = parameters_of(priors(SPACE)[4], SPACE)
    assert lost in [record.parameters for record in records], "the open trial was a prior"


def test_ctrl_c_within_a_trial_queues_it_again(tmp_path):
    url = storage_url(tmp_path / "study.db", tmp_path)

    def interrupted(trial):
        suggest(trial, SPACE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(url, 3, propose_and_score=interrupted)
    assert len(_run(url, 3)) == 3


@pytest.mark.parametrize("moment", ["while it is scored", "before it is claimed"])
def test_a_trial_that_another_process_took_too_and_told_first_is_left_to_it(
    tmp_path, monkeypatch, moment
):
    url = storage_url(tmp_path / "study.db", tmp_path)
    taken = []

    def told_elsewhere(trial):
        taken.append(trial.number)
        study = optuna.load_study(study_name="study", storage=url)
        study.tell(trial.number, 0.5)

    def scored(trial):
        if moment == "while it is scored" and len(taken) == 0:
            told_elsewhere(trial)
        return _score(trial)

    usual = optuna.Study.ask

    def ask(study, *arguments, **named):
        trial = usual(study, *arguments, **named)
        if moment == "before it is claimed" and len(taken) == 0:
            told_elsewhere(trial)
        return trial

    monkeypatch.setattr(optuna.Study, "ask", ask)
    records = _run(url, 6, propose_and_score=scored)
    assert len(taken) == 1
    assert len(records) == 6
    assert [record.value for record in records if record.number == taken[0]] == [0.5]


def test_unusable_storage_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="--storage"):
        _run("sqlite:////nonexistent/folder/study.db", 1)
    with pytest.raises(InputError, match="--storage"):
        _run("nosuch://secret@host/db", 1)


def _two_sided(trial):
    outcome = _score(trial)
    if outcome.rejected:
        return outcome
    bits = outcome.attributes["bits"]
    value = 2.0**-bits * (1 + (trial.params["method"] != "gptq"))
    return Outcome(value, (), outcome.attributes, objectives=(bits, value))


def test_nsga2_spreads_over_the_frontier_and_resumes(tmp_path):
    url = storage_url(tmp_path / "whole.db", tmp_path)
    whole = _run(url, 60, sampler="nsga2", propose_and_score=_two_sided)
    other = storage_url(tmp_path / "part.db", tmp_path)
    _run(other, 25, sampler="nsga2", propose_and_score=_two_sided)
    resumed = _run(other, 60, sampler="nsga2", propose_and_score=_two_sided)
    assert _outcomes(resumed) == _outcomes(whole)
    study = optuna.load_study(study_name="study", storage=url)
    assert len(study.directions) == 2
    front = sorted(trial.values[0] for trial in study.best_trials)
    assert front[0] < 4.4
    assert front[-1] > 5.6, "both ends of the sizes"
    assert len(front) >= 8
    assert all(record.value is None or record.value < 1 for record in whole)


def test_unknown_sampler_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must be one of tpe, nsga2, random.*Did you mean"):
        _run(storage_url(tmp_path / "a.db", tmp_path), 2, sampler="nsga")


def test_two_processes_share_a_study(tmp_path):
    """Both work at once; together they finish what was asked, and no trial is done twice."""
    url = storage_url(tmp_path / "shared.db", tmp_path)
    code = (
        "import sys, time\n"
        "from advisor.search.outcomes import Outcome\n"
        "from advisor.search.study import run_study\n"
        "def score(trial):\n"
        "    x = trial.suggest_float('x', 0, 1)\n"
        "    time.sleep(0.15)\n"
        "    return Outcome((x - 0.3) ** 2, (), {'process': sys.argv[1]})\n"
        f"run_study(name='study', url={url!r}, seed=3, trials=24,\n"
        "          propose_and_score=score, priors=[{'x': 0.5}, {'x': 0.6}],\n"
        "          stop=lambda: False)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(i)]) for i in (1, 2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    study = optuna.load_study(study_name="study", storage=url)
    done = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    assert 24 <= len(done) <= 26, "one may be under way when the last is told"
    by = {trial.user_attrs["advisor"]["process"] for trial in done}
    assert by == {"1", "2"}
    # Both may queue the priors of a study that is new to them at the same moment.
    sampled = [trial.params["x"] for trial in done if trial.params["x"] not in (0.5, 0.6)]
    assert len(set(sampled)) >= len(sampled) - 1


class Fixed:
    """Answers as told, and remembers what was asked."""

    def __init__(self, answers):
        self.answers = answers
        self.asked = []

    def suggest_categorical(self, name, choices):
        self.asked.append(name)
        assert self.answers[name] in choices
        return self.answers[name]

    def suggest_float(self, name, low, high):
        self.asked.append(name)
        assert low <= self.answers[name] <= high
        return self.answers[name]


def test_only_what_matters_is_asked():
    trial = Fixed(
        {"method": "rtn", "symmetric": True, "clip": "none", "allocation": "mixture",
         "target_bits": 5.0}
    )  # fmt: skip
    assert suggest(trial, SPACE) == Proposal(Family("rtn"), None, 5.0)
    assert not {"damping", "static_groups", "samples", "uniform_symmetric"} & set(trial.asked)


@pytest.mark.parametrize(
    ("method", "clip", "meant"),
    [("gptq", "gptq", "mse"), ("rtn", "gptq", "none"), ("best", "gptq", "gptq"),
     ("gptq", "none", "none"), ("rtn", "mse", "mse")],
)  # fmt: skip
def test_ranges_may_be_searched_under_gptq_alone(method, clip, meant):
    trial = Fixed(
        {"method": method, "symmetric": True, "clip": clip, "allocation": "mixture",
         "damping": 0.15, "activation_order": False, "static_groups": True, "samples": 8,
         "target_bits": 5.0}
    )  # fmt: skip
    family = suggest(trial, SPACE).family
    assert family.clip == meant
    settings = family.settings(QuantizationSettings())
    searched = [
        own for own in family.methods
        if own_settings(parse_scheme(f"{own}-int4-g64-sym"), settings).clip == "mse"
    ]  # fmt: skip
    assert searched == {"mse": [method], "gptq": ["gptq"], "none": []}[meant]


def test_gptqs_ranges_are_searched_at_first_and_no_others():
    assert {family.method: family.clip for family in usual_families(SPACE)} == {
        "rtn": "none", "gptq": "mse", "awq": "none", "best": "gptq",
    }  # fmt: skip


@pytest.mark.parametrize("proposal", priors(SPACE), ids=repr)
def test_priors_are_points_of_the_space(proposal):
    trial = Fixed(parameters_of(proposal, SPACE))
    assert suggest(trial, SPACE) == proposal
    single = {"uniform_asymmetric"}  # this grid has one storage: there is nothing to ask
    assert set(trial.asked) == set(trial.answers) - single


def test_every_method_and_uniform_storage_is_among_the_priors():
    found = priors(SPACE)
    assert {p.family.method for p in found} == {"rtn", "gptq", "awq", "best"}
    assert {(p.family.method, p.uniform) for p in found if p.uniform} >= {
        (method, name) for method in ("rtn", "gptq", "awq") for name in ("int4-g32", "int8-gch")
    }


def test_schemes_of_a_family():
    family = Family("awq", symmetric=False)
    assert [str(s) for s in schemes_of(family, OPTIONS, "awq")] == [
        "awq-int4-g64-asym",
        "rtn-fp8-gch-afp8",
    ]


def test_scores_are_shared_across_settings_that_do_not_matter():
    rtn = parse_scheme("rtn-int4-g64-sym")
    gptq = parse_scheme("gptq-int4-g64-sym")
    low, high = QuantizationSettings(damping=0.01), QuantizationSettings(damping=0.1)
    assert relevant_settings(rtn, low, 8) == relevant_settings(rtn, high, 16)
    assert relevant_settings(gptq, low, 8) != relevant_settings(gptq, high, 8)
    assert relevant_settings(gptq, low, 8) != relevant_settings(gptq, low, 16)
    block = parse_scheme("gguf-q4_k")
    assert relevant_settings(block, low, 8) == {"damping": 0.01, "samples": 8}
    finished = QuantizationSettings(damping=0.01, descent=3, output_feedback=0.7)
    assert relevant_settings(block, finished, 8) == relevant_settings(block, low, 8)
    assert finishing_settings(block, finished) == {
        "descent": [3, 0.05], "output_feedback": [0.7, 0.1],
    }  # fmt: skip


def test_block_types_are_a_family_of_their_own():
    types = [parse_scheme(f"gguf-{name}") for name in ("q4_k", "q6_k")]
    space = build_space(types, (8, 16), low_bits=4, high_bits=6)
    assert space.methods == ("gguf",)
    assert {proposal.family.samples for proposal in priors(space)} == {None}
    assert priors(space)[0].family.describe() == "gguf, damping 0.15, all samples"


def test_scoring_is_paid_once_for_what_families_share():
    gptq = Family("gptq", samples=16)
    assert scoring_cost(gptq, []) == 2
    assert scoring_cost(gptq, [gptq]) == 0
    best = Family("best", samples=16)
    assert scoring_cost(best, []) == 5
    assert scoring_cost(best, [gptq, Family("rtn")]) == 2, "only awq is new"
    assert scoring_cost(Family("best", damping=0.1, samples=16), [best]) == 2, "only gptq is new"


def test_a_mixture_of_either_grid_pays_for_gptq_on_both():
    one, either = Family("gptq", True, samples=8), Family("gptq", None, samples=8)
    assert scoring_cost(either, []) == 2 * scoring_cost(one, [])
    assert scoring_cost(either, [one]) == scoring_cost(one, [])
    assert scoring_cost(one, [either]) == 0
    rest = scoring_cost(Family("best", None, samples=8), [either])
    assert rest == scoring_cost(Family("best", True, samples=8), [one]), "the others: one grid"


def test_no_deprecated_or_experimental_warning_reaches_the_user(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(_run(storage_url(tmp_path / "study.db", tmp_path), 14)) == 14


def test_constraints_are_where_the_sampler_of_this_optuna_looks(tmp_path):
    url = storage_url(tmp_path / "study.db", tmp_path)
    records = _run(url, 40)
    done = optuna.load_study(study_name="study", storage=url).get_trials(
        states=(optuna.trial.TrialState.COMPLETE,)
    )
    feasible = {record.number for record in records if record.feasible}
    if not hasattr(optuna.trial.Trial, "set_constraint"):
        pytest.skip("Optuna 4 stores them under a name of its own")
    assert 0 < len(feasible) < len(done)
    assert feasible == {t.number for t in done if all(v <= 0 for v in t.constraints.values())}


def test_mixes_are_asked_for_where_there_are_several():
    space = build_space(OPTIONS[:3], (8, 16), low_bits=4.2, high_bits=6.0,
                        mixes=("given", "equal", "only a"))  # fmt: skip
    tried = [proposal.family for proposal in priors(space)]
    assert {f.mix for f in tried if f.method == "gptq"} == {"given", "equal", "only a"}
    assert {f.mix for f in tried if f.method != "gptq"} == {"given"}
    proposal = Proposal(Family("gptq", samples=8, mix="equal"), None, 5.0)
    assert parameters_of(proposal, space)["mix"] == "equal"
    plain = Proposal(Family("rtn"), None, 5.0)
    assert "mix" not in parameters_of(plain, space), "rounding needs no statistics"
    assert "mix" not in parameters_of(Proposal(Family("gptq"), None, 5.0), SPACE)
