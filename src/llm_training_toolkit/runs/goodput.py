"""Goodput of a run: each second belongs to one of six categories, so that they add up to the total time.

It spans attempts and commands: each starts with the seconds of the earlier ones.
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
GoodputCategory = Literal["startup", "data", "step", "checkpoint", "recomputation", "idle"]
GOODPUT_CATEGORIES: tuple[GoodputCategory, ...] = get_args(GoodputCategory)
SecondsByCategory = dict[GoodputCategory, float]
_INTENDED_ENDS = {"stopped", "finished"}  # after these end states the run does not wait for another attempt


def steady_clock() -> Callable[[], float]:
    """Return a clock of seconds since 1970 that ignores later changes of the machine's clock."""
    wall, counted = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - counted


class GoodputTracker:
    """Goodput of an attempt, on rank 0: the current category and the seconds so far."""

    def __init__(
        self,
        requested_at: float,
        earlier_seconds: Mapping[GoodputCategory, float],
        reached: int,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """Start at `requested_at`, when these workers were requested; `reached` is the last step ever completed."""
        self._clock, self._since = clock or steady_clock(), requested_at
        self._seconds_by_category: SecondsByCategory = {
            category: earlier_seconds.get(category, 0.0) for category in GOODPUT_CATEGORIES
        }
        self._last_completed_step = reached
        self._current_category: GoodputCategory = "startup"

    def enter_category(self, category: GoodputCategory) -> None:
        """Count time from now on as `category`."""
        now = max(self._clock(), self._since)  # never negative, even if the clock of `requested_at` is ahead
        self._seconds_by_category[self._current_category] += now - self._since
        self._current_category, self._since = category, now

    def enter_step(self, step: int) -> None:
        """Count time from now on as step number `step`, from 1."""
        self.enter_category("step" if step > self._last_completed_step else "recomputation")

    def compute_metrics(self) -> dict[str, float]:
        """Return the seconds so far as metrics; `goodput/fraction` is the share of the category `step`."""
        self.enter_category(self._current_category)
        total = sum(self._seconds_by_category.values())
        seconds = {
            f"goodput/{category}_seconds": round(self._seconds_by_category[category], 3)
            for category in GOODPUT_CATEGORIES
        }
        return seconds | {"goodput/fraction": self._seconds_by_category["step"] / total if total else 0.0}


def read_seconds_by_category(row: Mapping[str, float]) -> SecondsByCategory:
    """Return the seconds by category from a row of metrics; empty if it has none."""
    return {
        category: float(row[name]) for category in GOODPUT_CATEGORIES if (name := f"goodput/{category}_seconds") in row
    }


def format_goodput(split: Mapping[GoodputCategory, float]) -> str:
    """Format seconds by category as one line: the share of steps, then each category."""
    total = sum(split.values())
    categories = ", ".join(f"{category} {seconds:.1f} s" for category, seconds in split.items())
    return f"goodput {split['step'] / total:.0%} of {total:.0f} s: {categories}" if total else "goodput: nothing yet"


class GoodputState(NamedTuple):
    """Goodput that an attempt starts from."""

    seconds_by_category: SecondsByCategory
    last_completed_step: int
    """Last step ever completed."""
    accounted_until: float = 0.0
    """End of the accounted time, in seconds since 1970."""

    def start_tracker(self, requested_at: float) -> GoodputTracker:
        """Return the tracker of workers requested at `requested_at`."""
        # A process that re-executes its command (launch/torchrun.py) keeps its start time.
        return GoodputTracker(
            max(requested_at, self.accounted_until), self.seconds_by_category, self.last_completed_step
        )


def load_goodput_state(run: RunDirectory, requested_at: float) -> GoodputState:
    """Load the goodput so far, before the attempt of workers requested at `requested_at`."""
    previous = read_attempt_record(run, find_last_attempt(run))
    if not previous:
        return GoodputState({}, 0)
    rows = list(read_newest_rows(run.metrics_path))
    history = [
        (read_seconds_by_category(row), float(row["time"]))
        for row in rows
        if read_seconds_by_category(row) and "time" in row
    ]
    earlier_seconds, until = (
        history[-1] if history else ({}, float(read_attempt_record(run, 1).get("began", requested_at)))
    )
    waited_to = float(previous.get("command_ended", until if previous.get("state") in _INTENDED_ENDS else requested_at))
    earlier_seconds["idle"] = earlier_seconds.get("idle", 0.0) + max(0.0, waited_to - until)
    done = [int(row["step"]) for row in rows if "train/loss" in row]
    return GoodputState(earlier_seconds, max([int(previous.get("reached", 0)), *done[-1:]]), until)


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
