"""Search file: base run, search space, trials, scheduler and searcher. Read as strictly as a run file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from llm_training_toolkit.config.fields import KeyPath, format_key, resolve_key
from llm_training_toolkit.config.load import format_unknown_key, load_config, read_raw_config, validate_raw_config
from llm_training_toolkit.config.raw_config import RawConfig
from llm_training_toolkit.config.schema import Config
from llm_training_toolkit.config.section import ConfigSection, Count, Duration
from llm_training_toolkit.errors import ConfigError

Value = bool | int | float | str | None
# Keys and sections that are not hyperparameters, with the reason shown to users.
_UNSEARCHABLE_KEYS = {
    "run.name": "every trial has its own",
    "run.dir": "trials lie in the search's directory",
    "data.cache": "all trials share one",
    "data.eval": "trials measured on other documents cannot be compared; give it in overrides",
    "eval.max_sequences": "trials measured on other documents cannot be compared; give it in overrides",
    "train.tokens": "trials of different lengths cannot be compared; give the length of all in overrides",
    "train.steps": "trials of different lengths cannot be compared; give the length of all in overrides",
    "train.epochs": "trials of different lengths cannot be compared; give the length of all in overrides",
    "cluster": "all trials take as many workers; give it in overrides",
}


class ParameterDistribution(ConfigSection):
    """Distribution of one key: exactly one of the four fields. A plain list means `choice`."""

    choice: tuple[Value | tuple[Value, ...], ...] | None = None
    """List of values to choose from."""
    uniform: tuple[float, float] | None = None
    """Bounds of a number drawn uniformly."""
    loguniform: tuple[float, float] | None = None
    """Bounds, above zero, of a number drawn uniformly on a log scale; for learning rates."""
    randint: tuple[int, int] | None = None
    """Bounds, both included, of an integer drawn uniformly."""

    @model_validator(mode="after")
    def _check_distribution_kind(self) -> ParameterDistribution:
        if sum(kind is not None for kind in (self.choice, self.uniform, self.loguniform, self.randint)) != 1:
            raise ValueError("give exactly one of choice, uniform, loguniform and randint")
        if self.choice == ():
            raise ValueError("has nothing to choose from: give at least one value")
        if self.choice is not None and len({json.dumps(value) for value in self.choice}) < len(self.choice):
            raise ValueError("choice has a value twice")
        if self.choice is None and not self.range_bounds[0] < self.range_bounds[1]:
            raise ValueError(
                f"nothing lies between {self.range_bounds[0]:g} and {self.range_bounds[1]:g}: the smaller one "
                "comes first"
            )
        if self.loguniform is not None and self.loguniform[0] <= 0.0:
            raise ValueError("loguniform: both numbers must be above zero")
        return self

    @property
    def range_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of a range."""
        ends = self.uniform or self.loguniform or self.randint
        assert ends is not None, "a choice has no ends"
        return ends

    @property
    def boundary_values(self) -> tuple[Any, ...]:
        """Values at the corners of the search space: every choice, or both bounds."""
        if self.choice is not None:
            return tuple(list(value) if isinstance(value, tuple) else value for value in self.choice)
        return self.range_bounds

    def contains_value(self, value: object) -> bool:
        """Return whether the key may take this value."""
        if self.choice is not None:
            return json.dumps(value) in {json.dumps(choice) for choice in self.choice}
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return self.range_bounds[0] <= value <= self.range_bounds[1] and (
            self.randint is None or isinstance(value, int)
        )


class BudgetConfig(ConfigSection):
    """Limits of the whole search. At a limit no trial starts, and running trials end at their next rung."""

    tokens: Count | None = None
    """Tokens trained on, summed over all trials."""
    time: Duration | None = None
    """Working time of the search, summed over all its starts."""

    @model_validator(mode="after")
    def _check_has_limit(self) -> BudgetConfig:
        if self.tokens is None and self.time is None:
            raise ValueError("give tokens, time or both")
        return self


class SchedulerConfig(ConfigSection):
    """Early stopping: the scheduler decides at each rung which trials continue."""

    name: Literal["fifo", "asha", "median", "hyperband"] = "asha"
    """Policy at a rung. `fifo`: all trials run to their end. With `asha` the best 1/`reduction_factor` of the trials
    that have reached the rung continue. With `median` trials that are no worse than the median continue. The brackets
    of `hyperband` are asha with the first 0, 1, 2, ... rungs skipped; trials are assigned to them in turn."""
    reduction_factor: Annotated[int, Field(ge=2)] = 4
    """asha, hyperband: ratio of one rung to the previous one; one in this many trials continues."""
    grace_period_tokens: Count | None = None
    """Tokens at the first rung. With neither grace period: the trial's length / `reduction_factor`² (median: / 8)."""
    grace_period_steps: Count | None = None
    """Steps at the first rung, instead of tokens."""

    @model_validator(mode="after")
    def _check_first_rung_unit(self) -> SchedulerConfig:
        if self.grace_period_tokens is not None and self.grace_period_steps is not None:
            raise ValueError("grace_period_tokens and grace_period_steps both place the first rung: keep one")
        return self


class SearcherConfig(ConfigSection):
    """Searcher: proposes the parameters of the next trial."""

    name: Literal["random", "grid", "optuna"] = "random"
    """`random`: drawn from the distributions. `grid`: every combination once, in shuffled order. `optuna`: proposed by
    TPE from the results so far."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Random seed of the searcher."""
    n_startup_trials: Annotated[int, Field(ge=1)] = 8
    """optuna: random trials before TPE starts."""


class SearchConfig(ConfigSection):
    """Search over the hyperparameters of a run."""

    base: Annotated[str, Field(min_length=1)]
    """Run file that all trials are based on; its path relative to the search file."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] | None = None
    """Name of the search and of its directory, below the base's `run.dir`. Absent = name of the search file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the base that are changed for all trials, by dotted key: `train.steps: 200`."""
    search: dict[str, ParameterDistribution]
    """Search space: dotted keys of the run file, each with its distribution."""
    metric: Literal["eval/loss", "eval/perplexity", "eval/bits_per_byte", "train/loss"] = "eval/loss"
    """Metric that trials are compared by."""
    mode: Literal["min", "max"] = "min"
    """`min` = lower is better, `max` = higher is better."""
    trials: Annotated[int, Field(ge=1)] | None = None
    """Number of trials. Absent with grid = all combinations."""
    budget: BudgetConfig | None = None
    """Limit in tokens or time, instead of a number of trials or in addition to it."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """Early stopping of trials."""
    searcher: SearcherConfig = SearcherConfig()
    """Source of the trials' parameters."""
    points_to_evaluate: tuple[dict[str, Any], ...] = ()
    """Points to try first, each with a value for every key of `search`."""
    max_concurrent_trials: Annotated[int, Field(ge=1)] | None = None
    """Trials that run at the same time. Absent = as many as the cluster's resources allow."""
    max_failures: Annotated[int, Field(ge=0)] = 1
    """Retries of a failed trial, from its newest checkpoint."""
    invalid: Literal["refuse", "skip"] = "refuse"
    """Combinations that cannot be trained: `refuse` names them and ends, `skip` leaves them out."""

    @model_validator(mode="after")
    def _check_search_ends(self) -> SearchConfig:
        if not self.search:
            raise ValueError("search: nothing varies: give at least one key with its values")
        if self.trials is None and self.budget is None and self.searcher.name != "grid":
            raise ValueError("give trials, budget or both: the search has no end")
        ranges = [key for key, values in self.search.items() if values.choice is None]
        if self.searcher.name == "grid" and ranges:
            raise ValueError(f"a grid has choices alone: write out the values of {', '.join(ranges)}")
        return self


class LoadedSearch(NamedTuple):
    """Search, its base configuration, and the base with the search's `overrides`, which trials start from."""

    search: SearchConfig
    base_config: Config
    trial_config: Config


def load_search(path: Path, overrides: Sequence[str] = ()) -> LoadedSearch:
    """Load a search file and its base; check keys and `points_to_evaluate`.

    Raises ConfigError with every problem.
    """
    raw_config = read_raw_config(path, overrides)
    _expand_list_choices(raw_config)
    search = validate_raw_config(raw_config, SearchConfig)
    for section, keys in (("search", search.search), ("overrides", search.overrides)):
        for key in keys:
            if what := _find_key_problem(key, owned=section == "search"):
                raw_config.report_problem((section, key), what)
    for number, point in enumerate(search.points_to_evaluate):
        _check_point(search, number, point, raw_config)
    raw_config.raise_problems()
    whole = load_config(path.parent / search.base)
    return LoadedSearch(
        search, whole, replace_config_values(whole, search.overrides, f"{path}: base {search.base} with overrides")
    )


def _expand_list_choices(raw_config: RawConfig) -> None:
    """Expand `[a, b]` to `{choice: [a, b]}` before validation: a validator's result would not be strict JSON."""
    space = raw_config.data.get("search") if isinstance(raw_config.data, dict) else None
    if isinstance(space, dict):
        for key, values in space.items():
            if isinstance(values, list):
                space[key] = {"choice": values}


def _find_key_problem(key: str, *, owned: bool) -> str:
    parts = split_key(key)
    reason = next(
        (why for taken, why in _UNSEARCHABLE_KEYS.items() if owned and (key + ".").startswith(taken + ".")), ""
    )
    if reason:
        return f"cannot be searched: {reason}"
    found, _, _ = resolve_key(parts, Config)
    if len(found) == len(parts):
        return ""
    return _format_missing_key(parts, found)


def _format_missing_key(parts: KeyPath, found: KeyPath) -> str:
    try:
        return format_unknown_key(parts[: len(found) + 1], Config)
    except AssertionError:
        return f"{format_key(found)} is a value, no section: it has no {parts[len(found)]}"


def _check_point(search: SearchConfig, number: int, point: Mapping[str, Any], raw_config: RawConfig) -> None:
    for key in sorted(set(point) ^ set(search.search)):
        what = "is not searched: remove it" if key in point else "has no value: a point has one for every key"
        raw_config.report_problem(("points_to_evaluate", number, key), what)
    for key in set(point) & set(search.search):
        if not search.search[key].contains_value(point[key]):
            raw_config.report_problem(
                ("points_to_evaluate", number, key), "lies outside what search gives it", json.dumps(point[key])
            )


def split_key(key: str) -> KeyPath:
    """Return the parts of a dotted key, list indices as integers."""
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def replace_config_values(config: Config, values: Mapping[str, Any], where: str) -> Config:
    """Return the configuration with new values for some dotted keys, read strictly. Raises ConfigError.

    A new length of the run (tokens, steps or epochs) replaces the old one.
    """
    data = json.loads(config.model_dump_json(exclude_unset=True))
    for key, value in values.items():
        parts = split_key(key)
        if key in {"train.tokens", "train.steps", "train.epochs"}:
            data["train"] = {
                name: old for name, old in data["train"].items() if f"train.{name}" not in _UNSEARCHABLE_KEYS
            }
        holder = data
        for part in parts[:-1]:
            holder = _get_or_create_child(holder, part, key)
        _set_item(holder, parts[-1], value, key)
    return validate_raw_config(RawConfig(where, data), Config)


def _get_or_create_child(holder: Any, part: str | int, key: str) -> Any:  # noqa: ANN401 - plain data
    if isinstance(holder, dict):
        if holder.get(str(part)) is None:
            holder[str(part)] = {}
        return holder[str(part)]
    return holder[_check_list_index(holder, part, key)]


def _set_item(holder: Any, part: str | int, value: object, key: str) -> None:  # noqa: ANN401 - plain data
    if isinstance(holder, dict):
        holder[str(part)] = value
    else:
        holder[_check_list_index(holder, part, key)] = value


def _check_list_index(holder: Any, part: str | int, key: str) -> int:  # noqa: ANN401 - plain data
    if not isinstance(holder, list) or not isinstance(part, int) or part >= len(holder):
        there = f"entries 0 to {len(holder) - 1}" if isinstance(holder, list) and holder else "none"
        raise ConfigError(f"{key}: the base has no entry {part} there; it has {there}")
    return part
