"""Status of the runs in a directory, read from their files alone, for `ltt runs`.

Does without torch and Ray, to start fast and to leave running workers undisturbed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory, parse_checkpoint_name
from llm_training_toolkit.runs.goodput import SecondsByCategory, read_seconds_by_category
from llm_training_toolkit.runs.json_lines import read_newest_rows

RunState = Literal["starting", "running", "finished", "stopped", "failed", "lost", "unreadable"]
# final states of an attempt; after any other state another attempt should have followed
_ENDS: tuple[RunState, ...] = ("finished", "stopped", "failed")
_RECENT = 20  # steps used to estimate the speed and the time left


@dataclass(frozen=True)
class RunStatus:
    """One row of `ltt runs`."""

    name: str
    path: str
    state: RunState
    step: int
    steps: int | None
    seconds_left: float | None
    """Estimated time to the end, for a running run only."""
    loss: float | None
    """Training loss of the newest step."""
    checkpoint: str | None
    """Name of the newest complete checkpoint."""
    error: str | None
    """Error that the newest attempt failed with."""
    goodput: SecondsByCategory
    """Seconds by `GoodputCategory` over all attempts; empty before the first step."""
    tflops: float | None = None
    """FLOPs of the model per second and device, in 10^12: the median of the newest steps."""
    mfu: float | None = None
    """Share of the device's peak, by the same steps; None without a published peak."""

    def to_json(self) -> dict[str, Any]:
        """Return the object for `ltt runs --json`."""
        return asdict(self)


@dataclass(frozen=True)
class RunSpeed:
    """Medians of the newest steps, per device."""

    tokens_per_second: float
    """Tokens of whole sequences, whether or not they bear a loss."""
    tflops: float
    """FLOPs of loss tokens and attended tokens, in 10^12 per second."""
    mfu: float
    """Share of the device's peak, by the same FLOPs."""


def read_run_statuses(runs: Iterable[RunDirectory]) -> list[RunStatus]:
    """Return the status of every run, by name.

    A run with damaged or unreadable files is `unreadable` and hides no other.
    """
    return [_read_status_or_problem(run) for run in sorted(runs, key=lambda run: run.name)]


def _read_status_or_problem(run: RunDirectory) -> RunStatus:
    try:
        return read_run_status(run)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        return RunStatus(
            name=run.name,
            path=run.uri,
            state="unreadable",
            step=0,
            steps=None,
            seconds_left=None,
            loss=None,
            checkpoint=None,
            error=f"{type(error).__name__}: {error}",
            goodput={},
        )


def read_run_status(run: RunDirectory) -> RunStatus:
    """Return the current status of one run."""
    attempt = read_attempt_record(run, find_last_attempt(run))
    rows = list(_select_newest_attempt(read_newest_rows(run.metrics_path)))
    checkpoint = _find_newest_checkpoint(run)
    state = _derive_run_state(attempt, held=run.storage.is_held(run.path))
    step = max([int(row["step"]) for row in rows] + [each[0] for each in [checkpoint] if each], default=0)
    planned = _read_json(run.plan_path).get("steps")
    steps = planned if isinstance(planned, int) else None
    losses = [float(row["train/loss"]) for row in rows if "train/loss" in row]
    return RunStatus(
        name=run.name,
        path=run.uri,
        state=state,
        step=step,
        steps=steps,
        seconds_left=_estimate_seconds_left(rows, step, steps) if state == "running" else None,
        loss=losses[-1] if losses else None,
        checkpoint=run.get_checkpoint_dir(*checkpoint).name if checkpoint else None,
        error=str(attempt.get("error", "")) if state == "failed" else None,
        goodput=read_goodput(run),
        tflops=_compute_recent_median(rows, "perf/tflops"),
        mfu=_compute_recent_median(rows, "perf/mfu"),
    )


def read_goodput(run: RunDirectory) -> SecondsByCategory:
    """Return the seconds by category of all attempts so far; empty before the first step.

    Time from the last row to the end of the command is idle.
    """
    for row in reversed(list(read_newest_rows(run.metrics_path))):
        if "time" in row and (split := read_seconds_by_category(row)):
            ended = float(read_attempt_record(run, find_last_attempt(run)).get("command_ended", 0.0))
            split["idle"] += max(0.0, ended - float(row["time"]))
            return split
    return {}


def _derive_run_state(attempt: dict[str, Any], *, held: bool) -> RunState:
    """Derive the state from the newest attempt's record and from the lock."""
    said = attempt.get("state")
    if said == "running":
        return "running" if held else "lost"
    if held:
        return "starting"
    return said if said in _ENDS else "lost"


def _find_newest_checkpoint(run: RunDirectory) -> tuple[int, int] | None:
    found_checkpoints = [parse_checkpoint_name(path.parent) for path in run.checkpoints_dir.glob("*/manifest.json")]
    return max((checkpoint for checkpoint in found_checkpoints if checkpoint), default=None)


def _select_newest_attempt(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Select the rows of the newest attempt: it has recomputed the steps of earlier ones beyond its start."""
    found = list(rows)
    return (row for row in found if row.get("attempt") == found[-1].get("attempt"))


def _estimate_seconds_left(rows: Iterable[dict[str, Any]], step: int, steps: int | None) -> float | None:
    seconds = _compute_recent_median(rows, "perf/step_seconds")
    return None if seconds is None or steps is None else seconds * (steps - step)


def read_run_speed(run: RunDirectory) -> RunSpeed | None:
    """Return the speed of the newest steps of the newest attempt, or None unless it has both a speed and a published
    peak.
    """
    rows = list(_select_newest_attempt(read_newest_rows(run.metrics_path)))
    if not rows:
        return None
    workers = read_attempt_record(run, int(rows[-1].get("attempt", 0))).get("workers")
    names = ("perf/tokens_per_second", "perf/tflops", "perf/mfu")
    tokens, tflops, mfu = (_compute_recent_median(rows, name) for name in names)
    if not workers or tokens is None or tflops is None or mfu is None:
        return None
    return RunSpeed(tokens / int(workers), tflops, mfu)


def _compute_recent_median(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    """Return the median of a metric over the newest steps that have it."""
    values = [float(row[name]) for row in rows if name in row][-_RECENT:]
    return statistics.median(values) if values else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
