"""The Optuna study: persistent, resumable, reproducible. The only file that imports optuna."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy
from optuna.trial import TrialState

from advisor.errors import InputError, did_you_mean
from advisor.search.opening import opened
from advisor.search.outcomes import TrialRecord
from advisor.search.workers import is_alive, worker_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from advisor.search.outcomes import Outcome
    from advisor.search.space import Choice, Suggester

SAMPLERS = {
    "tpe": "TPE (multivariate, grouped, constrained)",
    "nsga2": "NSGA-II (size and predicted KL, constrained)",
    "random": "random",
}
"""Samplers on offer: ``nsga2`` spreads its trials over the whole frontier of size and KL."""
_STARTUP_TRIALS = 12
_POPULATION = 16
_RECENT = 20
_SEEDS_OF_A_WORKER = 100
_ATTRIBUTE = "advisor"
_SETS_CONSTRAINTS = hasattr(optuna.trial.Trial, "set_constraint")
"""Optuna 5 keeps constraints with the trial; Optuna 4 asks a function for them."""
_ALREADY_TOLD = (ValueError, optuna.exceptions.UpdateFinishedTrialError)
"""What Optuna raises where a finished trial is told or changed."""
_logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def check_sampler(name: str) -> None:
    """Refuse a sampler that there is not.

    Raises:
        InputError: There is no such sampler.
    """
    if name not in SAMPLERS:
        raise InputError(
            f"--sampler must be one of {', '.join(SAMPLERS)}, but got {name!r}."
            f"{did_you_mean(name, SAMPLERS)}"
        )


def run_study(
    *,
    name: str,
    url: str,
    seed: int,
    trials: int,
    propose_and_score: Callable[[Suggester], Outcome],
    priors: Sequence[Mapping[str, Choice]],
    stop: Callable[[], bool],
    report: Callable[[TrialRecord, int], None] | None = None,
    sampler: str = "tpe",
) -> list[TrialRecord]:
    """Run trials until the study holds ``trials`` finished ones; return them all.

    The same call resumes a study: finished trials stay, trials that a dead process left are
    queued again. With one worker the trials are a function of the arguments alone, also across
    interruptions, because the sampler is seeded anew for every trial.

    Args:
        name: Study's name, made of the content that its scores depend on.
        url: Database.
        seed: Seed of the sampler.
        trials: Finished trials wanted, those of earlier runs included.
        propose_and_score: Asks the trial for its choices and scores them.
        priors: Parameters tried first, in a new study.
        stop: Asked before each trial; True ends the run.
        report: Called after each trial with its record and the number of finished trials.
        sampler: One of :data:`SAMPLERS`; each needs a study of its own.

    Raises:
        InputError: The storage cannot be opened, or there is no such sampler.
    """
    check_sampler(sampler)
    study = _open(name, url, seed, sampler)
    if not study.get_trials(deepcopy=False):
        for parameters in priors:
            study.enqueue_trial(dict(parameters), skip_if_exists=True)
    _requeue_dead(study)
    while (finished := len(_finished(study))) < trials and not stop():
        study.sampler = _sampler(sampler, seed + finished + _apart(study))
        trial = study.ask()
        try:
            trial.set_user_attr("worker", worker_name())
            _tell(study, trial, propose_and_score(trial))
        except BaseException as error:
            found = study.get_trials(deepcopy=False)[trial.number]
            if not found.state.is_finished():
                _requeue(study, found)
                raise
            # SQLite lets two processes take one waiting trial; the other was first to tell.
            if not isinstance(error, _ALREADY_TOLD):
                raise
            continue
        if report is not None:
            report(_record(study.get_trials(deepcopy=False)[trial.number]), finished + 1)
    return [_record(trial) for trial in _finished(study)]


def check_storage(url: str) -> None:
    """Refuse, before any work, a database that cannot be opened or written.

    Raises:
        InputError: Its driver is missing, its server does not answer, or its folder is not there.
    """
    opened(url, lambda: _storage(url))


def _open(name: str, url: str, seed: int, sampler: str) -> optuna.Study:
    """Open or create the study; other processes may be creating it at the same moment."""
    return opened(url, lambda: _create(name, url, seed, sampler))


def _storage(url: str) -> optuna.storages.RDBStorage:
    arguments = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    storage = optuna.storages.RDBStorage(url, engine_kwargs=arguments)
    if url.startswith("sqlite"):
        _set_up_sqlite(storage)
    return storage


def _create(name: str, url: str, seed: int, sampler: str) -> optuna.Study:
    return optuna.create_study(
        study_name=name,
        storage=_storage(url),
        sampler=_sampler(sampler, seed),
        directions=["minimize"] * (2 if sampler == "nsga2" else 1),
        load_if_exists=True,
    )


def _set_up_sqlite(storage: optuna.storages.RDBStorage) -> None:
    """Let SQLite write ahead: a killed process loses nothing, and no commit waits for the disk."""

    def prepare(connection: Any, record: Any) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    sqlalchemy.event.listen(storage.engine, "connect", prepare)
    storage.engine.dispose()


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of one trial; random until there is something to learn from."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    constraints: dict[str, Any] = {}
    if not _SETS_CONSTRAINTS:
        constraints["constraints_func"] = lambda trial: trial.user_attrs.get(_ATTRIBUTE, {}).get(
            "constraints", (0.0,)
        )
    with warnings.catch_warnings():
        # Both options are called experimental, in some versions with a warning for every sampler.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if name == "nsga2":
            return optuna.samplers.NSGAIISampler(
                seed=seed, population_size=_POPULATION, **constraints
            )
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=_STARTUP_TRIALS,
            multivariate=True,
            group=True,
            constant_liar=True,
            **constraints,
        )


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Store an outcome."""
    remembered = {**outcome.attributes, "constraints": list(outcome.constraints) or [0.0]}
    if outcome.rejected is not None:
        remembered["rejected"] = outcome.rejected
    trial.set_user_attr(_ATTRIBUTE, remembered)  # one attribute, one commit
    if _SETS_CONSTRAINTS:
        for place, value in enumerate(remembered["constraints"]):
            trial.set_constraint(f"constraint {place}", value)
    if outcome.rejected is not None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        several = len(study.directions) > 1
        study.tell(trial, list(outcome.objectives) if several else outcome.value)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that have an outcome, in order."""
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    return list(study.get_trials(deepcopy=False, states=states))


def _record(trial: optuna.trial.FrozenTrial) -> TrialRecord:
    remembered = dict(trial.user_attrs.get(_ATTRIBUTE, {}))
    constraints = remembered.pop("constraints", [0.0])
    rejected = remembered.pop("rejected", None)
    return TrialRecord(
        number=trial.number,
        parameters=dict(trial.params),
        value=trial.values[-1] if trial.state == TrialState.COMPLETE else None,
        feasible=trial.state == TrialState.COMPLETE and all(value <= 0 for value in constraints),
        rejected=rejected,
        attributes=remembered,
    )


def _apart(study: optuna.Study) -> int:
    """Return what keeps workers of one study from proposing the same; 0 for one alone."""
    recent = study.get_trials(deepcopy=False)[-_RECENT:]
    others = {trial.user_attrs.get("worker", worker_name()): trial for trial in recent}
    if not any(is_alive(worker, _age(trial)) for worker, trial in others.items()):
        return 0
    digest = hashlib.sha256(worker_name().encode()).digest()
    return int.from_bytes(digest[:3], "big") * _SEEDS_OF_A_WORKER


def _age(trial: optuna.trial.FrozenTrial) -> float:
    """Return the seconds since a trial began."""
    started = trial.datetime_start
    return time.time() - started.timestamp() if started else float("inf")


def _requeue_dead(study: optuna.Study) -> None:
    """Queue the trials again whose process died; those of live processes are left alone."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_alive(trial.user_attrs.get("worker"), _age(trial)):
            continue
        _logger.info("trial %d was left unfinished: queued again", trial.number)
        _requeue(study, trial)


def _requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
    """Close an unfinished trial and queue what it was to try, asked for already or not."""
    wanted = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
    study.enqueue_trial(wanted, user_attrs={"retries": trial.number})
    study.tell(trial.number, state=TrialState.FAIL)
