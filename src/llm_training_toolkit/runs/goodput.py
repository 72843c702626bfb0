"""Where the time of a run goes: every second of it is put down to one of six parts, so they add up to all of it. Pure.

The account goes on over attempts and commands: each begins with what the ones before have put down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record, update_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.metrics_log import read_newest_rows

GoodputPart = Literal["startup", "data", "step", "checkpoint", "recomputation", "idle"]
"""startup: from the command, or from the moment new workers are asked for, to the first step.
data: looking up sequences, and waiting for data that is being prepared.
step: steps done for the first time, and evaluations.
checkpoint: what the steps wait for while a checkpoint is copied or completed, and the export.
recomputation: steps done again after a failure.
idle: from an attempt's last step to the moment that new workers are asked for: what a failure or a change of size costs
before anything begins anew. The time after a stop that was asked for is none of the run's."""
GOODPUT_PARTS: tuple[GoodputPart, ...] = get_args(GoodputPart)
SecondsByPart = dict[GoodputPart, float]
"""Seconds by part."""
_INTENDED_ENDS = {"stopped", "finished"}
"""How an attempt ends after which the run does not wait for the next one."""


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970, asked of the machine once: setting its clock later moves nothing."""
    wall, counted = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - counted


class GoodputTracker:
    """The account of an attempt, on rank 0: what it is doing now, and what was put down so far."""

    def __init__(
        self, began: float, before: Mapping[GoodputPart, float], reached: int, clock: Callable[[], float] | None = None
    ) -> None:
        """`began`: when these workers were asked for; `reached`: the last step that was ever completed before."""
        self._clock, self._since = clock or steady_clock(), began
        self._seconds_by_part: SecondsByPart = {part: before.get(part, 0.0) for part in GOODPUT_PARTS}
        self._last_completed_step = reached
        self._current_part: GoodputPart = "startup"

    def enter_part(self, part: GoodputPart) -> None:
        """From now on time goes to `part`."""
        now = max(self._clock(), self._since)  # where `began` is of a clock that is ahead, nothing is taken away
        self._seconds_by_part[self._current_part] += now - self._since
        self._current_part, self._since = part, now

    def enter_step(self, step: int) -> None:
        """From now on time goes to step number `step`, counted from 1."""
        self.enter_part("step" if step > self._last_completed_step else "recomputation")

    def compute_metrics(self) -> dict[str, float]:
        """The account until now, as metrics; `goodput/fraction` is the part that went into steps."""
        self.enter_part(self._current_part)
        total = sum(self._seconds_by_part.values())
        seconds = {f"goodput/{part}_seconds": round(self._seconds_by_part[part], 3) for part in GOODPUT_PARTS}
        return seconds | {"goodput/fraction": self._seconds_by_part["step"] / total if total else 0.0}


def read_seconds_by_part(row: Mapping[str, float]) -> SecondsByPart:
    """The account that a row of metrics holds; empty where it holds none."""
    return {part: float(row[name]) for part in GOODPUT_PARTS if (name := f"goodput/{part}_seconds") in row}


def format_goodput(split: Mapping[GoodputPart, float]) -> str:
    """A split as one line: the share of the steps, then seconds by part."""
    total = sum(split.values())
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in split.items())
    return f"goodput {split['step'] / total:.0%} of {total:.0f} s: {parts}" if total else "goodput: nothing yet"


class GoodputState(NamedTuple):
    """What an attempt begins its account with."""

    seconds_by_part: SecondsByPart
    last_completed_step: int
    """The last step that was ever completed."""
    accounted_until: float = 0.0
    """When the account stood so, in seconds since 1970: what comes before is in it."""

    def start_tracker(self, began: float) -> GoodputTracker:
        """The account of workers that were asked for at `began`."""
        # A process that becomes a new one of the same command (inline.py) keeps the moment it was started.
        return GoodputTracker(max(began, self.accounted_until), self.seconds_by_part, self.last_completed_step)


def load_goodput_state(run: RunDirectory, began: float) -> GoodputState:
    """The account so far, before the next attempt is taken, whose workers were asked for at `began`."""
    previous = read_attempt_record(run, find_last_attempt(run))
    if not previous:
        return GoodputState({}, 0)
    rows = list(read_newest_rows(run.metrics_path))
    accounts = [(read_seconds_by_part(row), float(row["time"])) for row in rows if read_seconds_by_part(row)]
    before, until = accounts[-1] if accounts else ({}, float(read_attempt_record(run, 1).get("began", began)))
    waited_to = float(previous.get("command_ended", until if previous.get("state") in _INTENDED_ENDS else began))
    before["idle"] = before.get("idle", 0.0) + max(0.0, waited_to - until)
    done = [int(row["step"]) for row in rows if "train/loss" in row]
    return GoodputState(before, max([int(previous.get("reached", 0)), *done[-1:]]), until)


def record_command_end(run: RunDirectory) -> None:
    """Write down that the command ends now, because the run has finished or was to stop: the run waits for nobody."""
    if attempt := find_last_attempt(run):
        update_attempt(run, attempt, command_ended=time.time())


def get_process_start_time() -> float:
    """When this process was started, in seconds since 1970.

    By its age in clock ticks: psutil counts from a boot time in whole seconds, and is up to one of them early.
    """
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.time() - age
