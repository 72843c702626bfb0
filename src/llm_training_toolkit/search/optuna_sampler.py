"""Points from what the trials so far have shown: Optuna's tree of Parzen estimators, told everything at each question.

Nothing is kept between questions, so a search that goes on after its driver's death asks as if nothing had happened.
"""

from __future__ import annotations

import math
import warnings
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from llm_training_toolkit.config.search import Distribution, Search
from llm_training_toolkit.search.event_log import Ledger, Trial
from llm_training_toolkit.search.space import Parameters, same

_STATES = {
    "begun": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def learnt(search: Search, ledger: Ledger, number: int) -> Parameters:
    """The point that the sampler proposes as number `number`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=search.searcher.seed * 100_003 + number,
            n_startup_trials=search.searcher.start,
            constant_liar=True,  # trials at work count as bad, so that several at a time do not ask for the same
        )
    study = optuna.create_study(sampler=sampler, direction="minimize" if search.mode == "min" else "maximize")
    for trial in ledger.trials.values():
        study.add_trial(_frozen(search, trial))
    asked = study.ask({key: _distribution(values) for key, values in search.search.items()})
    return {key: _value(search.search[key], value) for key, value in asked.params.items()}


def _frozen(search: Search, trial: Trial) -> FrozenTrial:
    state = _STATES[trial.state]
    if state is TrialState.COMPLETE and not (trial.last and math.isfinite(trial.last.value)):
        state = TrialState.FAIL
    ended = state.is_finished()
    return FrozenTrial(
        number=trial.number,
        trial_id=trial.number,
        state=state,
        value=trial.last.value if state is TrialState.COMPLETE and trial.last else None,
        datetime_start=datetime.now(UTC),
        datetime_complete=datetime.now(UTC) if ended else None,
        params={key: _inner(search.search[key], value) for key, value in trial.parameters.items()},
        distributions={key: _distribution(search.search[key]) for key in trial.parameters},
        user_attrs={},
        system_attrs={},
        intermediate_values={rung.rung: rung.value for rung in trial.rungs},
    )


def _distribution(values: Distribution) -> BaseDistribution:
    if values.choice is not None:
        return CategoricalDistribution(range(len(values.corners)))
    if values.integers is not None:
        return IntDistribution(*values.integers)
    return FloatDistribution(*values.ends, log=values.log_uniform is not None)


def _inner(values: Distribution, value: Any) -> Any:  # noqa: ANN401 - whatever a field takes
    """A choice by its position: Optuna takes no lists."""
    if values.choice is None:
        return value
    return [same({"": choice}) for choice in values.corners].index(same({"": value}))


def _value(values: Distribution, inner: Any) -> Any:  # noqa: ANN401 - as above
    return values.corners[inner] if values.choice is not None else inner
