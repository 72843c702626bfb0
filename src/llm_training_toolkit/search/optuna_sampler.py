"""Points from Optuna's tree of Parzen estimators (TPE), which receives all trials so far at each call.

The sampler keeps no state between calls, so a search that resumes after its driver's death proposes the same points.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from llm_training_toolkit.config.search import ParameterDistribution, SearchConfig
from llm_training_toolkit.search.event_log import EventLog, TrialRecord
from llm_training_toolkit.search.space import Parameters, point_key

_OPTUNA_STATES = {
    "begun": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def propose_optuna_point(search: SearchConfig, event_log: EventLog, number: int) -> Parameters:
    """Return the sampler's proposal for point `number`."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=search.searcher.seed * 100_003 + number,
            n_startup_trials=search.searcher.n_startup_trials,
            constant_liar=True,  # running trials count as bad, so that concurrent ones get different points
        )
    study = optuna.create_study(sampler=sampler, direction="minimize" if search.mode == "min" else "maximize")
    for trial in event_log.trials.values():
        study.add_trial(_build_frozen_trial(search, trial))
    asked = study.ask({key: build_distribution(values) for key, values in search.search.items()})
    return {key: _from_optuna_value(search.search[key], value) for key, value in asked.params.items()}


def _build_frozen_trial(search: SearchConfig, trial: TrialRecord) -> FrozenTrial:
    state = _OPTUNA_STATES[trial.state]
    if state is TrialState.COMPLETE and not (trial.last_rung and math.isfinite(trial.last_rung.value)):
        state = TrialState.FAIL
    return optuna.create_trial(
        state=state,
        value=trial.last_rung.value if state is TrialState.COMPLETE and trial.last_rung else None,
        params={key: _to_optuna_value(search.search[key], value) for key, value in trial.parameters.items()},
        distributions={key: build_distribution(search.search[key]) for key in trial.parameters},
        intermediate_values={rung.rung: rung.value for rung in trial.rungs},
    )


def build_distribution(values: ParameterDistribution) -> BaseDistribution:
    """Return Optuna's distribution of a key; choices are indices."""
    if values.choice is not None:
        return CategoricalDistribution(range(len(values.boundary_values)))
    if values.randint is not None:
        return IntDistribution(*values.randint)
    return FloatDistribution(*values.range_bounds, log=values.loguniform is not None)


def _to_optuna_value(values: ParameterDistribution, value: Any) -> Any:  # noqa: ANN401 - whatever a field takes
    """Convert a choice to its index: Optuna takes no lists."""
    if values.choice is None:
        return value
    return [point_key({"": choice}) for choice in values.boundary_values].index(point_key({"": value}))


def _from_optuna_value(values: ParameterDistribution, inner: Any) -> Any:  # noqa: ANN401 - as above
    return values.boundary_values[inner] if values.choice is not None else inner
