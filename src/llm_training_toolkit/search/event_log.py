"""The directory of a search and its ledger: what was begun, what each rung said, how each trial ended.

One line an event, written by the driver alone before it acts on it, so that the next driver knows all that this one
has decided, however it ended.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.search.space import Parameters

TrialStatus = Literal["begun", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class SearchDirectory:
    """The paths of one search."""

    path: Path

    @property
    def identity_path(self) -> Path:
        """What the search was begun with."""
        return self.path / "search.json"

    @property
    def event_log_path(self) -> Path:
        """One event a line, append only."""
        return self.path / "ledger.jsonl"

    @property
    def trials_dir(self) -> Path:
        """The run directories of the trials."""
        return self.path / "trials"

    @property
    def driver_run(self) -> RunDirectory:
        """Who works on the search, and its log."""
        return RunDirectory(self.path / "driver")

    @property
    def stop_marker_path(self) -> Path:
        """There while the trials are asked to stop with a checkpoint."""
        return self.path / "driver" / "stopping"

    def get_trial_run(self, number: int) -> RunDirectory:
        """The run directory of a trial."""
        return RunDirectory(self.trials_dir / format_trial_name(number))


def format_trial_name(number: int) -> str:
    """A trial's name."""
    return f"t{number:04d}"


@dataclass(frozen=True)
class RungResult:
    """What a trial had at a rung."""

    rung: int
    step: int
    tokens: int
    value: float
    go_on: bool
    bracket: int = 0
    """How many rungs the trial passed without being compared (Hyperband)."""
    last: bool = False
    """The trial's end."""


@dataclass
class TrialRecord:
    """What is known of a trial."""

    number: int
    parameters: Parameters
    draw_index: int | None
    """Which point of the searcher it is; None for a point to try first."""
    rungs: list[RungResult] = field(default_factory=list)
    state: TrialStatus = "begun"
    error: str | None = None
    failures: int = 0
    trained_tokens: int = 0
    """Tokens it had really trained on when it failed for good."""

    @property
    def name(self) -> str:
        """Its name."""
        return format_trial_name(self.number)

    @property
    def last_rung(self) -> RungResult | None:
        """The last rung it came to."""
        return self.rungs[-1] if self.rungs else None


class EventLog:
    """The ledger of a search, read and continued."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.trials: dict[int, TrialRecord] = {}
        self.invalid_points: dict[int, Parameters] = {}
        """Points of the searcher that cannot be trained."""
        self.passed_rungs: list[tuple[int, RungResult]] = []
        """Every rung, with its trial, in the order in which they were passed."""
        self.write_error = ""
        """Why something could not be written down; the search must not go on from there."""
        self._spans: list[list[float]] = []
        for event in _read_events(path):
            self._apply_event(event)
        path.parent.mkdir(parents=True, exist_ok=True)

    def record_start(self) -> None:
        """A driver begins to work: first it ends the trials whose end the last one had decided but not written down."""
        self._write_event({"event": "start"})
        for trial in self.unfinished_trials:
            if trial.last_rung is not None and not trial.last_rung.go_on:
                self.record_end(trial.number, "finished" if trial.last_rung.last else "stopped")

    def record_begin(self, trial: TrialRecord) -> None:
        """A trial is about to begin."""
        facts = {"trial": trial.number, "parameters": dict(trial.parameters), "draw": trial.draw_index}
        self._write_event({"event": "begin", **facts})

    def record_invalid_point(self, draw: int, parameters: Parameters, why: str) -> None:
        """A point of the searcher cannot be trained."""
        self._write_event({"event": "left_out", "draw": draw, "parameters": dict(parameters), "why": why})

    def record_rung(self, trial: int, rung: RungResult) -> None:
        """A trial has come to a rung, and whether it goes on is decided."""
        self._write_event({"event": "rung", "trial": trial, **rung.__dict__})

    def record_failure(self, trial: int, error: str) -> None:
        """A trial has failed and will be tried again."""
        self._write_event({"event": "failure", "trial": trial, "error": error})

    def record_end(self, trial: int, state: TrialStatus, error: str | None = None, trained: int = 0) -> None:
        """A trial has ended for good; one that failed has trained on so many tokens."""
        self._write_event({"event": "end", "trial": trial, "state": state, "error": error, "trained": trained})

    def record_heartbeat(self) -> None:
        """The driver works still: time that counts for the budget."""
        self._write_event({"event": "beat"})

    @property
    def next_draw(self) -> int:
        """The first point of the searcher that was not taken."""
        taken = [trial.draw_index for trial in self.trials.values() if trial.draw_index is not None]
        return 1 + max([*taken, *self.invalid_points], default=-1)

    @property
    def unfinished_trials(self) -> list[TrialRecord]:
        """Trials that have begun and not ended, in their order."""
        return [trial for trial in self.trials.values() if trial.state == "begun"]

    def get_rung_values(self, rung: int, bracket: int, but: int) -> list[float]:
        """What the other trials of a bracket had at a rung; an end, where the learning rate is low, is none."""
        return [
            passed.value
            for trial in self.trials.values()
            if trial.number != but
            for passed in trial.rungs
            if passed.rung == rung and passed.bracket == bracket and not passed.last
        ]

    def compute_active_seconds(self) -> float:
        """Working time of all drivers; of those before until their last event."""
        if not self._spans:
            return 0.0
        past = sum(last - first for first, last in self._spans[:-1])
        return past + max(time.time(), self._spans[-1][1]) - self._spans[-1][0]

    def _write_event(self, event: dict[str, Any]) -> None:
        """Append an event. Raises LaunchError, and remembers why, because Tune keeps the text of an error alone."""
        line = {"time": round(time.time(), 3), **event}
        try:
            self._append_line(json.dumps(line).encode() + b"\n")
        except OSError as error:
            self.write_error = f"{self._path} cannot be written ({error}); put that right, and the same command goes on"
            raise LaunchError(self.write_error) from error
        self._apply_event(line)

    def _append_line(self, line: bytes) -> None:
        with self._path.open("a+b") as file:
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")  # a driver that was killed, or a full disk, may have left half a line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _apply_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "start":
            self._spans.append([event["time"], event["time"]])
        elif self._spans:
            self._spans[-1][1] = event["time"]
        taker = getattr(self, f"_take_{event['event']}", None)
        if taker is not None:
            taker(event)

    def _take_begin(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        self.trials[number] = TrialRecord(number, event["parameters"], event["draw"])

    def _take_left_out(self, event: dict[str, Any]) -> None:
        self.invalid_points[event["draw"]] = event["parameters"]

    def _take_rung(self, event: dict[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        trial.rungs.append(RungResult(**{name: event[name] for name in RungResult.__dataclass_fields__}))
        self.passed_rungs.append((trial.number, trial.rungs[-1]))

    def _take_failure(self, event: dict[str, Any]) -> None:
        self.trials[event["trial"]].failures += 1
        self.trials[event["trial"]].error = event["error"]

    def _take_end(self, event: dict[str, Any]) -> None:
        trial = self.trials[event["trial"]]
        trial.state, trial.error, trial.trained_tokens = event["state"], event["error"], event["trained"]


def _ends_with_newline(file: Any) -> bool:  # noqa: ANN401 - a binary file
    file.seek(-1, 2)
    ends: bool = file.read(1) == b"\n"
    return ends


def _read_events(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a ledger."""
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        yield event
