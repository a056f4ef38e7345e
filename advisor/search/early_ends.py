"""Optuna's pruners at work within one measurement, whose steps are sequences of text."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import optuna

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SURE = 0.004
_SEEN_BETWEEN_TESTS = 8
"""Eight sequences that all are worse are enough: one in 256 by chance."""
_SEEN_BEFORE_STOPPING = 6


def surely_above(best: Sequence[float]) -> Callable[[Sequence[float]], bool]:
    """Return what tells whether values that come in one by one surely have a larger mean.

    Optuna's Wilcoxon pruner: a signed-rank test of the paired differences after every eighth value,
    at 0.4% each, since several looks are taken; never where the mean so far is not larger.

    Args:
        best: The values to be compared with, of the same sequences in the same order.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        pruner = optuna.pruners.WilcoxonPruner(
            p_threshold=_SURE, n_startup_steps=_SEEN_BETWEEN_TESTS
        )
    study = optuna.create_study(pruner=pruner)
    study.add_trial(
        optuna.trial.create_trial(
            value=sum(best) / len(best), intermediate_values=dict(enumerate(map(float, best)))
        )
    )
    return _watch(study, len(best), _SEEN_BETWEEN_TESTS)


def above_limit(limit: float) -> Callable[[Sequence[float]], bool]:
    """Return what tells whether the last of the values that come in one by one is above a limit.

    Optuna's threshold pruner. The values are lower confidence bounds of a mean over the sequences
    so far, so that one above a budget ends the measurement.
    """
    pruner = optuna.pruners.ThresholdPruner(upper=limit, n_warmup_steps=_SEEN_BEFORE_STOPPING - 1)
    return _watch(optuna.create_study(pruner=pruner), None)


def _watch(
    study: optuna.Study, known: int | None, every: int = 1
) -> Callable[[Sequence[float]], bool]:
    """Return what reports the values not yet reported to a trial, and asks its pruner now and then.

    Args:
        study: Holds the pruner.
        known: Values that there are to compare with; None for no limit.
        every: Values between two questions.
    """
    trial = study.ask()
    reported = 0

    def is_hopeless(values: Sequence[float]) -> bool:
        nonlocal reported
        for place in range(reported, len(values) if known is None else min(known, len(values))):
            trial.report(float(values[place]), place)
        reported = max(reported, len(values))
        return reported % every == 0 and bool(trial.should_prune())

    return is_hopeless
