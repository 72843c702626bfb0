"""Space of a search: boundary points, random and grid points, and checks that points can be trained. Pure."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.search import (
    ParameterDistribution,
    SchedulerConfig,
    SearchConfig,
    replace_config_values,
)
from llm_training_toolkit.errors import PlanError, ToolkitError
from llm_training_toolkit.plan import Plan, check_plan, make_plan

Parameters = Mapping[str, Any]  # a value for every searched key
_MAX_BOUNDARY_POINTS = 2000  # checked, a few milliseconds each; in larger spaces a random sample
_MAX_LISTED = 8  # invalid combinations named one by one


def format_point(parameters: Parameters) -> str:
    """Format a point for people."""
    return ", ".join(f"{key} = {format_short_value(value)}" for key, value in parameters.items())


def format_short_value(value: object) -> str:
    """Format a value for people."""
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def point_key(parameters: Parameters) -> str:
    """Return a string that is the same for equal points."""
    return json.dumps(parameters, sort_keys=True)


def count_combinations(search: SearchConfig) -> int | None:
    """Return the number of points, or None if a key has a range of numbers."""
    if any(values.choice is None for values in search.search.values()):
        return None
    return math.prod(len(values.boundary_values) for values in search.search.values())


def build_grid(search: SearchConfig) -> list[Parameters]:
    """Return every combination of choices, shuffled by the seed."""
    points = [
        dict(zip(search.search, values, strict=True)) for values in itertools.product(*_get_boundary_values(search))
    ]
    random.Random(search.searcher.seed).shuffle(points)  # noqa: S311 - an order, not a secret
    return list(points)


def draw_random_point(search: SearchConfig, number: int) -> Parameters:
    """Draw a random point that depends only on the seed and its number."""
    chance = random.Random(f"{search.searcher.seed}:{number}")  # noqa: S311 - as above
    return {key: _draw_random_value(values, chance) for key, values in search.search.items()}


def _draw_random_value(values: ParameterDistribution, chance: random.Random) -> Any:  # noqa: ANN401 - whatever a field takes
    if values.choice is not None:
        return chance.choice(values.boundary_values)
    low, high = values.range_bounds
    if values.randint is not None:
        return chance.randint(*values.randint)
    if values.loguniform is not None:
        return min(max(math.exp(chance.uniform(math.log(low), math.log(high))), low), high)
    return chance.uniform(low, high)


def _get_boundary_values(search: SearchConfig) -> list[Sequence[Any]]:
    return [values.boundary_values for values in search.search.values()]


def boundary_points(search: SearchConfig) -> Iterator[Parameters]:
    """Yield `points_to_evaluate` and every boundary point of the space.

    With more than 2000 of them: each value of each key with the others at their first, then random boundary points.
    """
    yield from search.points_to_evaluate
    keys, values = list(search.search), _get_boundary_values(search)
    if math.prod(map(len, values)) <= _MAX_BOUNDARY_POINTS:
        yield from (dict(zip(keys, point, strict=True)) for point in itertools.product(*values))
        return
    begin = dict(zip(keys, (options[0] for options in values), strict=True))
    for key, options in zip(keys, values, strict=True):
        yield from (begin | {key: option} for option in options)
    chance = random.Random(search.searcher.seed)  # noqa: S311 - as above
    for _ in range(_MAX_BOUNDARY_POINTS):
        yield dict(zip(keys, map(chance.choice, values), strict=True))


@dataclass(frozen=True)
class TrialConfigBuilder:
    """Builds the configurations of a search's trials."""

    search: SearchConfig
    base: Config
    directory: str
    """Parent of the trials' run directories."""
    cache: str
    """Cache of prepared data, shared by all trials and the base."""

    def build_config(self, parameters: Parameters, name: str = "trial") -> Config:
        """Return the configuration of a trial. Raises ConfigError if the schema refuses it."""
        return replace_config_values(
            self.base, {**parameters, **self._get_trial_overrides(name)}, f"trial with {format_point(parameters)}"
        )

    def _get_trial_overrides(self, name: str) -> dict[str, Any]:
        return {
            "run.name": name,
            "run.dir": self.directory,
            "data.cache": self.cache,
            "checkpoint.keep_latest": 1,
            "export.at_end": False,
            "eval.tasks": [],
            # Its default depends on the batch, and trials must be measured on the same sequences.
            "eval.max_sequences": self.base.max_eval_sequences,
        }

    def plan_trial(self, parameters: Parameters) -> Plan:
        """Return the plan of the trial at a point. Raises ToolkitError if it cannot be trained."""
        return check_plan(make_plan(self.build_config(parameters)))

    def find_problem(self, parameters: Parameters) -> str | None:
        """Return the reason a point cannot be trained; None if it can."""
        try:
            self.plan_trial(parameters)
        except ToolkitError as error:
            return str(error)
        return None


def check_search_space(trials: TrialConfigBuilder) -> list[str]:
    """Check every boundary point before anything starts. Return messages on the invalid ones if they are skipped.

    Raises PlanError that names them if they are refused or all are invalid, or if the base does not suit a search.
    """
    search, base = trials.search, trials.base
    if base.cluster.workers == 0 or base.cluster.min_workers != base.cluster.max_workers:
        raise PlanError(
            f"cluster.workers = {json.dumps(base.cluster.workers)}: a trial has a fixed number of Ray workers, so that "
            "it is known how many trials fit at a time; put `cluster.workers: 1` under overrides"
        )
    if search.metric.startswith("eval/") and not base.data.eval.fraction and not base.data.eval.sources:
        raise PlanError(
            f"metric = {search.metric}: nothing is held out (data.eval.fraction = 0), so it is never reported; give "
            "data.eval.fraction in the base or under overrides, or take metric: train/loss"
        )
    if search.metric != "eval/bits_per_byte" and any(key.startswith("tokenizer.") for key in search.search):
        raise PlanError(
            f"metric = {search.metric}: a loss per token says nothing between tokenizers; take metric: "
            "eval/bits_per_byte"
        )
    looked = {point_key(point): point for point in boundary_points(search)}
    plans: dict[str, Plan] = {}
    bad: dict[str, str] = {}
    for point in looked.values():
        try:
            plans[format_point(point)] = trials.plan_trial(point)
        except ToolkitError as error:
            bad[format_point(point)] = str(error)
    _check_rungs(search.scheduler, plans)
    words = [f"{point}: {_format_problem_line(problem)}" for point, problem in bad.items()]
    if words and (search.invalid == "refuse" or len(bad) == len(looked)):
        raise PlanError(_format_invalid_points(words, len(looked)))
    return words


def _check_rungs(scheduler: SchedulerConfig, plans: Mapping[str, Plan]) -> None:
    """Check that the first rung comes before the end of every trial and after a whole step. Raises PlanError."""
    for point, plan in plans.items():
        length = (plan.steps or math.inf, (plan.steps or math.inf) * plan.tokens_per_step)
        for name, first, own in (
            ("grace_period_steps", scheduler.grace_period_steps, length[0]),
            ("grace_period_tokens", scheduler.grace_period_tokens, length[1]),
        ):
            if first is not None and first >= own:
                raise PlanError(
                    f"scheduler.{name} = {first:,.0f}, but the trial with {point} ends after "
                    f"{own:,.0f}: trials "
                    "would never be compared before their ends; give a smaller one, or none: the default goes by the "
                    "length"
                )
        if (scheduler.grace_period_tokens or math.inf) < plan.tokens_per_step:
            raise PlanError(
                f"scheduler.grace_period_tokens = {scheduler.grace_period_tokens:,.0f}, but a step of the trial with "
                f"{point} has {plan.tokens_per_step:,}; give at least as many"
            )


def _format_problem_line(problem: str) -> str:
    return " | ".join(
        line.partition(": ")[2] if line.startswith("trial with ") else line for line in _split_lines(problem)
    )


def _split_lines(text: str) -> Iterable[str]:
    return (line for line in text.splitlines() if line)


def _format_invalid_points(words: Sequence[str], of: int) -> str:
    more = [f"  and {len(words) - _MAX_LISTED} more"] if len(words) > _MAX_LISTED else []
    end = "" if len(words) == of else "; `invalid: skip` searches the others"
    return "\n".join(
        [f"{len(words)} of {of} corners of the space cannot be trained{end}:"]
        + [f"  {line}" for line in words[:_MAX_LISTED]]
        + more
    )
