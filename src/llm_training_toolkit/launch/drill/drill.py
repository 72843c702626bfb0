"""A drill: one run undisturbed, one with failures drawn by chance, and what differs between them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.config import Config, load
from llm_training_toolkit.config.uri import is_address
from llm_training_toolkit.errors import ConfigError, LaunchError
from llm_training_toolkit.launch.drill.faults import KINDS, Victim, being_written, steps_done
from llm_training_toolkit.launch.drill.local_cluster import OwnCluster
from llm_training_toolkit.launch.drill.report import Clock, Injected, Report, newest_undamaged, report, rows
from llm_training_toolkit.runs.attempts import attempt_record, last_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup.machine import refuse_too_many

_LOOK_EVERY = 0.1
_STARTS_AGAIN = 5
"""Starts in a row without a step in between, after which the drill gives up."""
_RECOVERS_WITHIN = 1200.0
"""Seconds without a step after a failure, after which it does."""
_OVERRIDES = ("failures.ledger=true", "failures.max=100000", "failures.same_step=100000", "export.at_end=false")
"""What both runs are given: failures close together are what a drill is for, so none of them ends the run."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What a drill is to do."""

    config: Path
    overrides: Sequence[str]
    kills: int
    kinds: Sequence[str]
    seed: int
    hang: str
    """`failures.hang` of both runs: a drill does not wait ten minutes for each."""


class Drill:
    """Carries out an order, in a directory of its own beside the run's."""

    def __init__(self, order: Order, say: Say) -> None:
        """Raises ConfigError for what the run cannot have."""
        self._order, self._say, self._draw = order, say, random.Random(order.seed)  # noqa: S311 - to be repeated
        self._given = (*order.overrides, f"failures.hang={order.hang}", *_OVERRIDES)
        self._config = load(order.config, self._given)
        _refuse_unfit(self._config, order.kinds)
        parent = Path(self._config.run.dir).expanduser().absolute()
        self._directory = parent / f"{self._config.run.name}-drill-{time.strftime('%Y%m%d-%H%M%S')}"
        self._cluster: OwnCluster | None = None
        self._driver: subprocess.Popen[str] | None = None

    def carry_out(self) -> Report:
        """Run both and compare them. Raises LaunchError when one of them does not finish."""
        calm, hurt = (RunDirectory(self._directory / name) for name in ("undisturbed", "disturbed"))
        with self._ground():
            self._say(f"the undisturbed run, in {calm.path}")
            began = time.time()
            self._start(calm)
            self._finish(calm)
            steps, cold = rows(calm)[-1]["step"], rows(calm)[0]["time"] - began
            self._say(f"{steps} steps, first after {cold:.1f} s; now with {self._order.kills} failures")
            again = time.time()
            failures = self._disturb(hurt, schedule(steps, self._order.kills, self._order.kinds, self._draw))
            clock = Clock(cold, again - began, time.time() - again)
        return report(self._order.seed, calm, hurt, failures, clock)

    @contextmanager
    def _ground(self) -> Iterator[None]:
        """A cluster of its own where a failure needs one; however the drill ends, its commands end with it."""
        if any(KINDS[kind].needs == "nodes" for kind in self._order.kinds):
            asked = self._config.cluster
            there = len(os.sched_getaffinity(0)) // asked.cpus_per_worker
            self._cluster = OwnCluster(min(asked.most, there), asked.cpus_per_worker)
        try:
            yield
        finally:
            if self._driver is not None and self._driver.poll() is None:
                self._driver.terminate()
                self._driver.wait()
            if self._cluster is not None:
                self._cluster.close()

    def _disturb(self, run: RunDirectory, due: Sequence[tuple[int, str]]) -> list[Injected]:
        found: list[Injected] = []
        driver = self._start(run)
        for step, kind in due:
            driver = self._wait(run, lambda now, step=step: now[1] >= max(step, 1))  # type: ignore[misc]
            if driver.poll() is not None:
                self._say(f"{len(due) - len(found)} failures came too late: the run had finished")
                break
            damaged = KINDS[kind].strike(Victim(run, driver, self._draw, self._cluster))
            at, attempt, half = time.time(), last_attempt(run), being_written(run)
            newest, reached = newest_undamaged(run, damaged), steps_done(run)[1]
            self._wait(run, lambda now, attempt=attempt: now[0] > attempt, at + _RECOVERS_WITHIN)  # type: ignore[misc]
            row = next((row for row in rows(run) if row["attempt"] > attempt), None)
            if row is None:
                self._say(f"{kind} after step {reached}: the run had just finished")
                break
            after = attempt_record(run, row["attempt"])
            seconds = row["time"] - at, row["time"] - after["group_began"]
            found.append(Injected(kind, reached, *seconds, newest, after["resumed"], half))
            self._say(f"{kind} after step {reached}: next step {found[-1].seconds_to_recover:.1f} s later")
        self._finish(run)
        return found

    def _start(self, run: RunDirectory) -> subprocess.Popen[str]:
        place = (f"run.dir={run.path.parent}", f"run.name={run.name}")
        command = [sys.executable, "-m", "llm_training_toolkit", "train", str(self._order.config)]
        environment = os.environ | self._cluster.environment if self._cluster else os.environ
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with _log(run).open("a") as log:
            self._driver = subprocess.Popen(
                [*command, *self._given, *place], env=environment, stdout=log, stderr=subprocess.STDOUT, text=True
            )
        return self._driver

    def _wait(
        self, run: RunDirectory, reached: Callable[[tuple[int, int]], bool], until: float = float("inf")
    ) -> subprocess.Popen[str]:
        """Wait until (attempt, step) is reached, or the run has finished; a command that ended is given again.

        Raises LaunchError when it does not come up, or not until a moment in seconds since 1970.
        """
        assert self._driver is not None
        starts, before = 0, steps_done(run)
        while not reached(now := steps_done(run)):
            if now != before:
                starts, before = 0, now
            if self._driver.poll() == 0:
                break
            if self._driver.poll() is not None:
                starts += 1
                if starts > _STARTS_AGAIN:
                    raise LaunchError(f"the run does not come up again: see {_log(run)}")
                self._start(run)
            if time.time() > until:
                raise LaunchError(f"no step was done in the {_RECOVERS_WITHIN / 60:g} minutes since: see {_log(run)}")
            time.sleep(_LOOK_EVERY)
        return self._driver

    def _finish(self, run: RunDirectory) -> None:
        if self._wait(run, lambda _now: False).wait() != 0:
            raise LaunchError(f"the run did not finish: see {_log(run)}")


def schedule(steps: int, kills: int, kinds: Sequence[str], draw: random.Random) -> list[tuple[int, str]]:
    """(step, kind) of each failure: one within each of equal stretches of the run, no kind more often than another.

    The last stretch is left to those that wait for a checkpoint.
    """
    stretch = (steps - 1) / (kills + 1)
    kinds_due: list[str] = []
    while len(kinds_due) < kills:
        kinds_due += draw.sample(kinds, len(kinds))
    return [
        (int(index * stretch + draw.uniform(0.1, 0.9) * stretch), kind) for index, kind in enumerate(kinds_due[:kills])
    ]


def _refuse_unfit(config: Config, kinds: Sequence[str]) -> None:
    if is_address(config.run.dir):
        raise ConfigError(f"run.dir = {config.run.dir}: a drill damages files of its runs: name a path")
    fitting = [name for name, kind in KINDS.items() if config.cluster.workers != 0 or not kind.needs]
    if not kinds or set(kinds) - set(fitting):
        why = "" if config.cluster.workers else " (hang, node, notice and head need Ray: cluster.workers)"
        raise ConfigError(f"--kinds {','.join(kinds)}: this run can have {', '.join(fitting)}{why}")
    if any(KINDS[kind].needs == "nodes" for kind in kinds):
        refuse_too_many(config)


def _log(run: RunDirectory) -> Path:
    """What its commands say."""
    return run.path.parent / f"{run.name}.log"
