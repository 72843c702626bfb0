"""Where the time of a run goes: every second of it is put down to one of six parts, so they add up to all of it. Pure.

The account goes on over attempts and commands: each begins with what the ones before have put down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from llm_training_toolkit.runs.attempts import attempt_record, last_attempt, note_in_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.metrics_log import newest_rows

Part = Literal["startup", "data", "step", "checkpoint", "recomputation", "idle"]
"""startup: from the command, or from the moment new workers are asked for, to the first step.
data: looking up sequences, and waiting for data that is being prepared.
step: steps done for the first time, and evaluations.
checkpoint: what the steps wait for while a checkpoint is copied or completed, and the export.
recomputation: steps done again after a failure.
idle: from an attempt's last step to the moment that new workers are asked for: what a failure or a change of size costs
before anything begins anew. The time after a stop that was asked for is none of the run's."""
PARTS: tuple[Part, ...] = get_args(Part)
Split = dict[Part, float]
"""Seconds by part."""
_ASKED_FOR = {"stopped", "finished"}
"""How an attempt ends after which the run does not wait for the next one."""


def steady_clock() -> Callable[[], float]:
    """Seconds since 1970, asked of the machine once: setting its clock later moves nothing."""
    wall, counted = time.time(), time.monotonic()
    return lambda: wall + time.monotonic() - counted


class Account:
    """The account of an attempt, on rank 0: what it is doing now, and what was put down so far."""

    def __init__(
        self, began: float, before: Mapping[Part, float], reached: int, clock: Callable[[], float] | None = None
    ) -> None:
        """`began`: when these workers were asked for; `reached`: the last step that was ever completed before."""
        self._clock, self._since = clock or steady_clock(), began
        self._split: Split = {part: before.get(part, 0.0) for part in PARTS}
        self._reached = reached
        self._doing: Part = "startup"

    def enter(self, part: Part) -> None:
        """From now on time goes to `part`."""
        now = max(self._clock(), self._since)  # where `began` is of a clock that is ahead, nothing is taken away
        self._split[self._doing] += now - self._since
        self._doing, self._since = part, now

    def enter_step(self, step: int) -> None:
        """From now on time goes to step number `step`, counted from 1."""
        self.enter("step" if step > self._reached else "recomputation")

    def values(self) -> dict[str, float]:
        """The account until now, as metrics; `goodput/fraction` is the part that went into steps."""
        self.enter(self._doing)
        total = sum(self._split.values())
        seconds = {f"goodput/{part}_seconds": round(self._split[part], 3) for part in PARTS}
        return seconds | {"goodput/fraction": self._split["step"] / total if total else 0.0}


def split_of(row: Mapping[str, float]) -> Split:
    """The account that a row of metrics holds; empty where it holds none."""
    return {part: float(row[name]) for part in PARTS if (name := f"goodput/{part}_seconds") in row}


def in_words(split: Mapping[Part, float]) -> str:
    """A split as one line: the share of the steps, then seconds by part."""
    total = sum(split.values())
    parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in split.items())
    return f"goodput {split['step'] / total:.0%} of {total:.0f} s: {parts}" if total else "goodput: nothing yet"


class Carried(NamedTuple):
    """What an attempt begins its account with."""

    before: Split
    reached: int
    """The last step that was ever completed."""
    until: float = 0.0
    """When the account stood so, in seconds since 1970: what comes before is in it."""

    def open(self, began: float) -> Account:
        """The account of workers that were asked for at `began`."""
        # A process that becomes a new one of the same command (inline.py) keeps the moment it was started.
        return Account(max(began, self.until), self.before, self.reached)


def carried(run: RunDirectory, began: float) -> Carried:
    """The account so far, before the next attempt is taken, whose workers were asked for at `began`."""
    previous = attempt_record(run, last_attempt(run))
    if not previous:
        return Carried({}, 0)
    rows = list(newest_rows(run.metrics))
    accounts = [(split_of(row), float(row["time"])) for row in rows if split_of(row)]
    before, until = accounts[-1] if accounts else ({}, float(attempt_record(run, 1).get("began", began)))
    waited_to = float(previous.get("command_ended", until if previous.get("state") in _ASKED_FOR else began))
    before["idle"] = before.get("idle", 0.0) + max(0.0, waited_to - until)
    done = [int(row["step"]) for row in rows if "train/loss" in row]
    return Carried(before, max([int(previous.get("reached", 0)), *done[-1:]]), until)


def note_end(run: RunDirectory) -> None:
    """Write down that the command ends now, because the run has finished or was to stop: the run waits for nobody."""
    if attempt := last_attempt(run):
        note_in_attempt(run, attempt, command_ended=time.time())


def command_began() -> float:
    """When this process was started, in seconds since 1970.

    By its age in clock ticks: psutil counts from a boot time in whole seconds, and is up to one of them early.
    """
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return time.time() - age
