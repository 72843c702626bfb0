"""Results of a search: ranking of trials, best so far, values to compare. Pure, except for reading files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_training_toolkit.config.search import SearchConfig
from llm_training_toolkit.runs.json_lines import read_json_lines
from llm_training_toolkit.search.early_stopping import get_sort_key, is_better
from llm_training_toolkit.search.event_log import EventLog, SearchDirectory, TrialRecord


def rank_trials(event_log: EventLog, mode: str) -> list[TrialRecord]:
    """Return all trials, the best first: by last rung, then by value; failed ones last."""
    reached = [trial for trial in event_log.trials.values() if trial.last_rung is not None and trial.state != "failed"]
    others = [trial for trial in event_log.trials.values() if trial.last_rung is None or trial.state == "failed"]
    return [
        *sorted(reached, key=lambda trial: _get_rank_key(trial, mode)),
        *sorted(others, key=lambda trial: (trial.state == "failed", trial.number)),
    ]


def _get_rank_key(trial: TrialRecord, mode: str) -> tuple[int, int, float]:
    assert trial.last_rung is not None, "only trials that came to a rung have merit"
    # Ends rank equally, whatever their index: the rungs before them depend on the batch size.
    return (
        -trial.last_rung.last,
        0 if trial.last_rung.last else -trial.last_rung.rung,
        get_sort_key(mode, trial.last_rung.value),
    )


def find_best_trial(event_log: EventLog, mode: str) -> TrialRecord | None:
    """Return the best trial, or None before any has reached a rung."""
    first = next(iter(rank_trials(event_log, mode)), None)
    return first if first is not None and first.last_rung is not None and first.state != "failed" else None


def get_trial_tokens(trial: TrialRecord) -> int:
    """Return the tokens a trial had trained on at its last rung, or until it failed for good.

    Unless it failed, steps repeated or done since its last rung are excluded.
    """
    return max(trial.last_rung.tokens if trial.last_rung else 0, trial.trained_tokens)


def read_trained_tokens(path: Path) -> int:
    """Return the tokens that a run actually trained on, including steps repeated after a failure."""
    total = 0.0
    for row in read_json_lines(path):
        total += row.get("perf/tokens_per_second", 0.0) * row.get("perf/step_seconds", 0.0)
    return round(total)


def compute_best_so_far(event_log: EventLog, mode: str) -> list[tuple[int, float]]:
    """Return (tokens of all trials, best value so far) at each improvement and at the end, in the order of rungs."""
    tokens, found = 0, list[tuple[int, float]]()
    before: dict[int, int] = {}
    for number, rung in event_log.passed_rungs:
        tokens += rung.tokens - before.get(number, 0)
        before[number] = rung.tokens
        if math.isfinite(rung.value) and (not found or is_better(mode, rung.value, found[-1][1])):
            found.append((tokens, rung.value))
    return [*found, (tokens, found[-1][1])] if found else []


def find_comparable_values(event_log: EventLog, mode: str) -> list[tuple[TrialRecord, float]]:
    """Return the trials at the rung most of them reached (later on a tie), with their values there.

    A value that is not finite counts as the worst finite one; the list is empty if all are so.
    """
    by_rung: dict[int, list[tuple[TrialRecord, float]]] = {}
    for trial in event_log.trials.values():
        for passed in trial.rungs:
            by_rung.setdefault(passed.rung, []).append((trial, passed.value))
    rung = max(by_rung, key=lambda rung: (len(by_rung[rung]), rung), default=0)
    found = by_rung.get(rung, [])
    finite = [value for _, value in found if math.isfinite(value)]
    if not finite:
        return []
    worst = max(finite) if mode == "min" else min(finite)
    return [(trial, value if math.isfinite(value) else worst) for trial, value in found]


def build_trial_row(trial: TrialRecord) -> dict[str, Any]:
    """Return a trial as plain data, for `--json` and results.parquet."""
    last = trial.last_rung
    value = last.value if last and math.isfinite(last.value) else None
    return {
        "trial": trial.name,
        "state": trial.state,
        "value": value,
        "rung": last.rung if last else None,
        "step": last.step if last else None,
        "tokens": get_trial_tokens(trial),
        "failures": trial.failures,
        "error": trial.error,
        "config": dict(trial.parameters),
    }


def build_summary(search: SearchConfig, event_log: EventLog, directory: SearchDirectory) -> dict[str, Any]:
    """Return the summary of a search: the contract of `ltt tune --json`."""
    winner = find_best_trial(event_log, search.mode)
    won: Mapping[str, Any] | None = None
    if winner is not None:
        found = build_trial_row(winner)
        won = {"trial": found["trial"], "config": found["config"], "value": found["value"]}
    return {
        "search": str(directory.path),
        "best": won,
        "trials": [build_trial_row(trial) for trial in rank_trials(event_log, search.mode)],
        "tokens": sum(read_trained_tokens(directory.get_trial_run(number).metrics_path) for number in event_log.trials),
    }
