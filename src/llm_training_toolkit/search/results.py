"""What a search has shown: its trials in order, the best so far, how much each key matters. Pure, but for reading."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_training_toolkit.config.search import Search
from llm_training_toolkit.search.early_stopping import better, key
from llm_training_toolkit.search.event_log import Ledger, SearchDirectory, Trial
from llm_training_toolkit.search.space import same


def ranked(ledger: Ledger, mode: str) -> list[Trial]:
    """All trials, the best first: those that came further before others, then by value."""
    reached = [trial for trial in ledger.trials.values() if trial.last is not None and trial.state != "failed"]
    others = [trial for trial in ledger.trials.values() if trial.last is None or trial.state == "failed"]
    return [
        *sorted(reached, key=lambda trial: _merit(trial, mode)),
        *sorted(others, key=lambda trial: (trial.state == "failed", trial.number)),
    ]


def _merit(trial: Trial, mode: str) -> tuple[int, int, float]:
    assert trial.last is not None, "only trials that came to a rung have merit"
    # Ends are equal, whatever their number: with another batch there are other rungs before them.
    return (-trial.last.last, 0 if trial.last.last else -trial.last.rung, key(mode, trial.last.value))


def best(ledger: Ledger, mode: str) -> Trial | None:
    """The trial that won; None where none came to a rung."""
    first = next(iter(ranked(ledger, mode)), None)
    return first if first is not None and first.last is not None and first.state != "failed" else None


def tokens_of(trial: Trial) -> int:
    """Tokens a trial had trained on at its last rung, or until it failed for good.

    What a trial that has not failed did twice or since its last rung is not in it.
    """
    return max(trial.last.tokens if trial.last else 0, trial.trained)


def spent(path: Path) -> int:
    """Tokens that a run has really trained on, what was done twice after a failure included."""
    total = 0.0
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        total += row.get("perf/tokens_per_second", 0.0) * row.get("perf/step_seconds", 0.0)
    return round(total)


def progress(ledger: Ledger, mode: str) -> list[tuple[int, float]]:
    """The best value of any trial so far against the tokens of all together, in the order rungs were passed."""
    tokens, found = 0, list[tuple[int, float]]()
    before: dict[int, int] = {}
    for number, rung in ledger.passed:
        tokens += rung.tokens - before.get(number, 0)
        before[number] = rung.tokens
        if math.isfinite(rung.value) and (not found or better(mode, rung.value, found[-1][1])):
            found.append((tokens, rung.value))
    return [*found, (tokens, found[-1][1])] if found else []


def importance(search: Search, ledger: Ledger) -> dict[str, float]:
    """How much of the values' variance each key explains alone, at the first rung that most trials came to.

    From 0 to 1: between groups for choices, by a parabola for numbers (in the logarithm for log_uniform), adjusted for
    the number of groups or coefficients. Empty with fewer than four trials.
    """
    rung, values = _comparable(ledger)
    trials = [trial for trial in ledger.trials.values() if any(passed.rung == rung for passed in trial.rungs)]
    if len(values) < 4 or float(np.var(values)) == 0.0:
        return {}
    return {name: _explained(search, name, trials, values) for name in search.search}


def _comparable(ledger: Ledger) -> tuple[int, np.ndarray[Any, np.dtype[np.float64]]]:
    """The rung that most trials came to, and their values there; what is no number takes no part."""
    by_rung: dict[int, list[float]] = {}
    for trial in ledger.trials.values():
        for passed in trial.rungs:
            by_rung.setdefault(passed.rung, []).append(passed.value)
    rung = max(by_rung, key=lambda rung: (len(by_rung[rung]), rung), default=0)
    values = np.array(by_rung.get(rung, []), dtype=float)
    finite = values[np.isfinite(values)]
    return rung, np.where(np.isfinite(values), values, finite.max() if finite.size else 0.0)


def _explained(search: Search, name: str, trials: Sequence[Trial], values: Any) -> float:  # noqa: ANN401 - an array
    ranges = search.search[name]
    settings = [trial.parameters[name] for trial in trials]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in settings)
    if ranges.choice is None and numeric:
        at = np.array(settings, dtype=float)
        at = np.log(at) if ranges.log_uniform is not None else at
        degree = min(2, len(set(settings)) - 1)
        predicted = np.polyval(np.polyfit(at - at.mean(), values, degree), at - at.mean()) if degree else values.mean()
        used = degree
    else:
        groups: dict[str, list[int]] = {}
        for index, value in enumerate(settings):
            groups.setdefault(same({"": value}), []).append(index)
        predicted = np.empty_like(values)
        for members in groups.values():
            predicted[members] = values[members].mean()
        used = len(groups) - 1
    left, whole = float(np.sum((values - predicted) ** 2)), float(np.sum((values - values.mean()) ** 2))
    free = len(values) - used - 1
    adjusted = 1.0 - (left / free) / (whole / (len(values) - 1)) if free > 0 else 0.0
    return min(max(adjusted, 0.0), 1.0)


def row(trial: Trial) -> dict[str, Any]:
    """A trial as plain data: what `--json`, the table of the report and results.parquet have of it."""
    last = trial.last
    value = last.value if last and math.isfinite(last.value) else None
    return {
        "trial": trial.name,
        "state": trial.state,
        "value": value,
        "rung": last.rung if last else None,
        "step": last.step if last else None,
        "tokens": tokens_of(trial),
        "failures": trial.failures,
        "error": trial.error,
        "config": dict(trial.parameters),
    }


def summary(search: Search, ledger: Ledger, directory: SearchDirectory) -> dict[str, Any]:
    """The contract of `ltt tune --json`."""
    winner = best(ledger, search.mode)
    won: Mapping[str, Any] | None = None
    if winner is not None:
        found = row(winner)
        won = {"trial": found["trial"], "config": found["config"], "value": found["value"]}
    return {
        "search": str(directory.path),
        "best": won,
        "trials": [row(trial) for trial in ranked(ledger, search.mode)],
        "tokens": sum(spent(directory.trial(number).metrics) for number in ledger.trials),
    }
