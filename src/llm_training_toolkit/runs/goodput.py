"""Goodput of a run: each second belongs to one of six parts, so that they add up to the total time.

The account spans attempts and commands: each begins with the seconds of the earlier ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record, update_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.json_lines import read_newest_rows

# startup: from the command, or from the request for new workers, to the first step.
# data: looking up sequences, and waiting for data in preparation.
# step: steps done for the first time, and evaluations.
# checkpoint: time that steps wait while a checkpoint is copied or completed, and the export.
# recomputation: steps done again after a failure.
# idle: from an attempt's last step to the request for new workers (failure or resize).
# Time after a requested stop is not counted.
GoodputPart = Literal["startup", "data", "step", "checkpoint", "recomputation", "idle"]
GOODPUT_PARTS: tuple[GoodputPart, ...] = get_args(GoodputPart)
SecondsByPart = dict[GoodputPart, float]
_INTENDED_ENDS = {"stopped", "finished"}  # after these end states the run does not wait for another attempt


def steady_clock() -> Callable[[], float]:
    """Return a clock of seconds since 1970 that ignores later changes of the machine's clock."""
    wall, counted = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - counted


class GoodputTracker:
    """Goodput account of an attempt, on rank 0: the current part and the seconds so far."""

    def __init__(
        self, began: float, before: Mapping[GoodputPart, float], reached: int, clock: Callable[[], float] | None = None
    ) -> None:
        """Start at `began`, the time these workers were requested; `reached` is the last step ever completed before."""
        self._clock, self._since = clock or steady_clock(), began
        self._seconds_by_part: SecondsByPart = {part: before.get(part, 0.0) for part in GOODPUT_PARTS}
        self._last_completed_step = reached
        self._current_part: GoodputPart = "startup"

    def enter_part(self, part: GoodputPart) -> None:
        """Count time from now on as `part`."""
        now = max(self._clock(), self._since)  # never negative, even if the clock of `began` is ahead
        self._seconds_by_part[self._current_part] += now - self._since
        self._current_part, self._since = part, now

    def enter_step(self, step: int) -> None:
        """Count time from now on as step number `step`, from 1."""
        self.enter_part("step" if step > self._last_completed_step else "recomputation")

    def compute_metrics(self) -> dict[str, float]:
        """Return the seconds so far as metrics; `goodput/fraction` is the share of the part `step`."""
        self.enter_part(self._current_part)
        total = sum(self._seconds_by_part.values())
        seconds = {f"goodput/{part}_seconds": round(self._seconds_by_part[part], 3) for part in GOODPUT_PARTS}
        return seconds | {"goodput/fraction": self._seconds_by_part["step"] / total if total else 0.0}


def read_seconds_by_part(row: Mapping[str, float]) -> SecondsByPart:
    """Return the seconds by part from a row of metrics; empty if it has none."""
    return {part: float(row[name]) for part in GOODPUT_PARTS if (name := f"goodput/{part}_seconds") in row}


def format_goodput(split: Mapping[GoodputPart, float]) -> str:
    """Format seconds by part as one line: the share of steps, then each part."""
    total = sum(split.values())
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in split.items())
    return f"goodput {split['step'] / total:.0%} of {total:.0f} s: {parts}" if total else "goodput: nothing yet"


class GoodputState(NamedTuple):
    """Account that an attempt starts from."""

    seconds_by_part: SecondsByPart
    last_completed_step: int
    """Last step ever completed."""
    accounted_until: float = 0.0
    """End of the accounted time, in seconds since 1970."""

    def start_tracker(self, began: float) -> GoodputTracker:
        """Start the account of workers requested at `began`."""
        # A process that re-executes its command (launch/torchrun.py) keeps its start time.
        return GoodputTracker(max(began, self.accounted_until), self.seconds_by_part, self.last_completed_step)


def load_goodput_state(run: RunDirectory, began: float) -> GoodputState:
    """Load the account so far, before the attempt of workers requested at `began` is begun."""
    previous = read_attempt_record(run, find_last_attempt(run))
    if not previous:
        return GoodputState({}, 0)
    rows = list(read_newest_rows(run.metrics_path))
    accounts = [
        (read_seconds_by_part(row), float(row["time"])) for row in rows if read_seconds_by_part(row) and "time" in row
    ]
    before, until = accounts[-1] if accounts else ({}, float(read_attempt_record(run, 1).get("began", began)))
    waited_to = float(previous.get("command_ended", until if previous.get("state") in _INTENDED_ENDS else began))
    before["idle"] = before.get("idle", 0.0) + max(0.0, waited_to - until)
    done = [int(row["step"]) for row in rows if "train/loss" in row]
    return GoodputState(before, max([int(previous.get("reached", 0)), *done[-1:]]), until)


def record_command_end(run: RunDirectory) -> None:
    """Record the end of the command after a finish or a requested stop: later time is not idle."""
    if attempt := find_last_attempt(run):
        update_attempt(run, attempt, command_ended=time.time())


def get_process_start_time() -> float:
    """Return when this process was started, in seconds since 1970.

    Uses its age in clock ticks: psutil uses a boot time in whole seconds, and is up to one second early.
    """
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.time() - age
