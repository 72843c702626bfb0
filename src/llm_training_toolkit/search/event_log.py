"""Directory of a search and its event log: trials begun, decisions at rungs, failures, ends.

One event per line, written by the driver alone before it acts on the event. The next driver therefore reads every
decision of this one, however it ended.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.errors import CheckpointError, LaunchError
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_json_lines, terminate_last_line
from llm_training_toolkit.search.space import Parameters

TrialStatus = Literal["begun", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class SearchDirectory:
    """The paths of one search."""

    path: Path

    @property
    def identity_path(self) -> Path:
        """Settings that the search was started with."""
        return self.path / "search.json"

    @property
    def event_log_path(self) -> Path:
        """Event log: one event per line, append only."""
        return self.path / "events.jsonl"

    @property
    def trials_dir(self) -> Path:
        """Run directories of the trials."""
        return self.path / "trials"

    @property
    def driver_run(self) -> RunDirectory:
        """Lock and log of the driver."""
        return RunDirectory(self.path / "driver")

    @property
    def stop_marker_path(self) -> Path:
        """Marker file that exists while trials are asked to stop with a checkpoint."""
        return self.path / "driver" / "stopping"

    def get_trial_run(self, number: int) -> RunDirectory:
        """Return the run directory of a trial."""
        return RunDirectory(self.trials_dir / format_trial_name(number))


def format_trial_name(number: int) -> str:
    """Format a trial's name."""
    return f"t{number:04d}"


@dataclass(frozen=True)
class RungResult:
    """Result of a trial at a rung, and the decision."""

    rung: int
    step: int
    tokens: int
    value: float
    promoted: bool
    bracket: int = 0
    """Rungs that the trial passes without comparison (Hyperband)."""
    last: bool = False
    """The rung is the trial's end."""


@dataclass
class TrialRecord:
    """State of a trial, from the event log."""

    number: int
    parameters: Parameters
    draw_index: int | None
    """Index of the searcher's point; `None` for one of `points_to_evaluate`."""
    rungs: list[RungResult] = field(default_factory=list)
    state: TrialStatus = "begun"
    error: str | None = None
    failures: int = 0
    trained_tokens: int = 0
    """Tokens actually trained on when it failed for good."""

    @property
    def name(self) -> str:
        """Name of the trial."""
        return format_trial_name(self.number)

    @property
    def last_rung(self) -> RungResult | None:
        """Last rung that the trial reached."""
        return self.rungs[-1] if self.rungs else None


class EventLog:
    """Event log of a search: reads the existing events and appends new ones."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trials: dict[int, TrialRecord] = {}
        self.invalid_points: dict[int, Parameters] = {}
        """Points of the searcher that cannot be trained, by draw index."""
        self.passed_rungs: list[tuple[int, RungResult]] = []
        """Every rung with its trial's number, in the order passed."""
        self.write_error = ""
        """Message of a failed write, after which the search must not continue."""
        self._spans: list[list[float]] = []
        for event in read_json_lines(path):
            self._apply_event(event)
        path.parent.mkdir(parents=True, exist_ok=True)

    def record_start(self) -> None:
        """Record the start of a driver, and the ends of trials that the last driver decided without recording them."""
        self._write_event({"event": "start"})
        for trial in self.unfinished_trials:
            if trial.last_rung is not None and not trial.last_rung.promoted:
                self.record_end(trial.number, "finished" if trial.last_rung.last else "stopped")

    def record_begin(self, trial: TrialRecord) -> None:
        """Record that a trial is about to begin."""
        facts = {"trial": trial.number, "parameters": dict(trial.parameters), "draw": trial.draw_index}
        self._write_event({"event": "begin", **facts})

    def record_invalid_point(self, draw: int, parameters: Parameters, why: str) -> None:
        """Record that a point of the searcher cannot be trained."""
        self._write_event({"event": "left_out", "draw": draw, "parameters": dict(parameters), "why": why})

    def record_rung(self, trial: int, rung: RungResult) -> None:
        """Record a trial's result and decision at a rung."""
        self._write_event({"event": "rung", "trial": trial, **rung.__dict__})

    def record_failure(self, trial: int, error: str) -> None:
        """Record the failure of a trial that will be retried."""
        self._write_event({"event": "failure", "trial": trial, "error": error})

    def record_end(self, trial: int, state: TrialStatus, error: str | None = None, trained: int = 0) -> None:
        """Record that a trial has ended for good; `trained` is the tokens of one that failed."""
        self._write_event({"event": "end", "trial": trial, "state": state, "error": error, "trained": trained})

    def record_heartbeat(self) -> None:
        """Record that the driver still runs, so that its time counts for the budget."""
        self._write_event({"event": "beat"})

    @property
    def next_draw(self) -> int:
        """Index of the first point of the searcher not yet taken."""
        taken = [trial.draw_index for trial in self.trials.values() if trial.draw_index is not None]
        return 1 + max([*taken, *self.invalid_points], default=-1)

    @property
    def unfinished_trials(self) -> list[TrialRecord]:
        """Trials begun and not ended, in order."""
        return [trial for trial in self.trials.values() if trial.state == "begun"]

    def get_rung_values(self, rung: int, bracket: int, excluding: int) -> list[float]:
        """Return the values of a bracket's other trials at a rung, except ends: the learning rate is low there."""
        return [
            passed.value
            for trial in self.trials.values()
            if trial.number != excluding
            for passed in trial.rungs
            if passed.rung == rung and passed.bracket == bracket and not passed.last
        ]

    def compute_active_seconds(self) -> float:
        """Return the working time of all drivers; that of earlier ones lasts until their last event."""
        if not self._spans:
            return 0.0
        past = sum(last - first for first, last in self._spans[:-1])
        return past + max(time.time(), self._spans[-1][1]) - self._spans[-1][0]

    def _write_event(self, event: dict[str, Any]) -> None:
        """Append an event. Raises LaunchError, and keeps it in `write_error`: Tune keeps only the text of an error."""
        line = {"time": round(time.time(), 3), **event}
        try:
            self._append_line(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self.write_error = f"{self._path} cannot be written ({error}); put that right, and the same command resumes"
            raise LaunchError(self.write_error) from error
        self._apply_event(line)

    def _append_line(self, line: bytes) -> None:
        terminate_last_line(self._path)  # a killed driver or a full disk may have left half a line
        with self._path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _apply_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._spans.append([event["time"], event["time"]])
        elif self._spans:
            self._spans[-1][1] = event["time"]
        match event["event"]:
            case "begin":
                number = event["trial"]
                self.trials[number] = TrialRecord(number, event["parameters"], event["draw"])
            case "left_out":
                self.invalid_points[event["draw"]] = event["parameters"]
            case "rung":
                self._apply_rung(event)
            case "failure":
                self.trials[event["trial"]].failures += 1
                self.trials[event["trial"]].error = event["error"]
            case "end":
                trial = self.trials[event["trial"]]
                trial.state, trial.error, trial.trained_tokens = event["state"], event["error"], event["trained"]

    def _apply_rung(self, event: dict[str, Any]) -> None:
        if "promoted" not in event:
            raise CheckpointError(
                f"{self._path}: the event log is of an earlier version of the toolkit: start a search of another name"
            )
        trial = self.trials[event["trial"]]
        trial.rungs.append(RungResult(**{name: event[name] for name in RungResult.__dataclass_fields__}))
        self.passed_rungs.append((trial.number, trial.rungs[-1]))
