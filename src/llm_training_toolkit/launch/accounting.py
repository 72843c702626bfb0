"""The account of a run's time, carried on from its files: metrics.jsonl and attempts/."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

from llm_training_toolkit.goodput import Account, Split, split_of
from llm_training_toolkit.overview import newest_rows
from llm_training_toolkit.runs import RunDirectory, attempt_record, last_attempt, note_in_attempt

_ASKED_FOR = {"stopped", "finished"}
"""How an attempt ends after which the run does not wait for the next one."""


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
