"""The failures of a drill: each real, done to a run that works on this machine, found through its files."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from subprocess import Popen
from typing import NamedTuple

from llm_training_toolkit.checkpoint import complete
from llm_training_toolkit.overview import newest_rows
from llm_training_toolkit.runs import RunDirectory, attempt_record, checkpoint_place, last_attempt

_LOOK_EVERY = 0.005
"""Seconds between two looks for a checkpoint that is being written, which may take no longer than some of them."""
_SAVING = 0.1
"""Seconds within which a kill follows the moment a checkpoint is seen to begin."""
_WAITS = 300.0
"""Seconds to wait for what a failure needs: a second checkpoint, one that is being written."""


class Victim(NamedTuple):
    """A run that works, and the command that drives it."""

    run: RunDirectory
    driver: Popen[str]
    draw: random.Random

    def rank(self) -> int:
        """The process of a rank drawn by chance."""
        processes: list[int] = attempt_record(self.run, last_attempt(self.run))["processes"]
        return self.draw.choice(processes)


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, signal.SIGKILL)


def _worker(victim: Victim) -> None:
    _kill(victim.rank())


def _driver(victim: Victim) -> None:
    victim.driver.kill()


def _hang(victim: Victim) -> None:
    os.kill(victim.rank(), signal.SIGSTOP)


def _saving(victim: Victim) -> None:
    if _until(lambda: _being_written(victim.run), victim):
        time.sleep(victim.draw.uniform(0.0, _SAVING))
    _kill(victim.rank())


def _truncated(victim: Victim) -> None:
    _until(lambda: len(complete(victim.run.checkpoints)) > 1, victim)
    newest = max(complete(victim.run.checkpoints), key=lambda path: checkpoint_place(path) or (0, 0))
    file = victim.draw.choice(sorted(newest.glob("*.safetensors")))
    os.truncate(file, victim.draw.randrange(file.stat().st_size))
    _kill(victim.rank())


def _being_written(run: RunDirectory) -> bool:
    attempt = last_attempt(run)
    return any(not (path / "manifest.json").exists() for path in run.checkpoints.glob(f"step_*_a{attempt}"))


def _until(condition: Callable[[], bool], victim: Victim) -> bool:
    """Wait for a condition while the run works; whether it came true."""
    end = time.monotonic() + _WAITS
    while victim.driver.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(_LOOK_EVERY)
    return False


KINDS: dict[str, Callable[[Victim], None]] = {
    "worker": _worker,
    "driver": _driver,
    "saving": _saving,
    "truncated": _truncated,
    "hang": _hang,
}
"""worker: SIGKILL to a rank. driver: SIGKILL to the command, which is then given again. saving: SIGKILL to a rank while
a checkpoint is being written. truncated: the newest checkpoint loses its end, and a rank is killed. hang: SIGSTOP to a
rank."""


def steps_done(run: RunDirectory) -> tuple[int, int]:
    """(attempt, step) of the newest row of a step; zeros before the first."""
    rows = [row for row in newest_rows(run.metrics) if "train/loss" in row]
    return (int(rows[-1]["attempt"]), int(rows[-1]["step"])) if rows else (0, 0)
