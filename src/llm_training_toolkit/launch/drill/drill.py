"""A drill: one run undisturbed, one with failures drawn by chance, and what differs between them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llm_training_toolkit.checkpoint import newest, read_manifest
from llm_training_toolkit.config import load
from llm_training_toolkit.data.receipt import Receipt
from llm_training_toolkit.errors import ConfigError, LaunchError
from llm_training_toolkit.goodput import Split, in_words
from llm_training_toolkit.launch.drill.failures import KINDS, Victim, steps_done
from llm_training_toolkit.launch.drill.lineage import compare, fetched_along, stretches
from llm_training_toolkit.overview import goodput
from llm_training_toolkit.runs import RunDirectory, last_attempt

_LOOK_EVERY = 0.05
_STARTS_AGAIN = 5
"""Starts in a row without a step in between, after which the drill gives up."""
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


@dataclass(frozen=True)
class Injected:
    """A failure and how the run came back."""

    kind: str
    step: int
    """The last step that was complete."""
    seconds_to_recover: float
    """Until the next attempt had completed a step."""


@dataclass(frozen=True)
class Report:
    """What a drill found: the contract of `ltt drill --json`."""

    run: str
    seed: int
    steps: int
    failures: tuple[Injected, ...]
    sequences_missing: int
    sequences_doubled: int
    steps_repeated: int
    max_loss_difference: float
    """Of any step, along the lineage."""
    weights_equal: bool
    """The final weights and moments are those of the undisturbed run, bit for bit."""
    cold_start_seconds: float
    """From the undisturbed run's command to its first step: what recovering is to be compared with."""
    wall_seconds: float
    """Of the disturbed run, from its first command to the end of its last one."""
    goodput: Split
    goodput_undisturbed: Split

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


class Drill:
    """Carries out an order, in a directory of its own beside the run's."""

    def __init__(self, order: Order, say: Say) -> None:
        self._order, self._say, self._draw = order, say, random.Random(order.seed)  # noqa: S311 - to be repeated
        config = load(order.config, order.overrides)
        parent = Path(config.run.dir).expanduser().absolute()
        self._directory = parent / f"{config.run.name}-drill-{time.strftime('%Y%m%d-%H%M%S')}"
        alone = config.cluster.workers == 0
        unknown = sorted(set(order.kinds) - KINDS.keys())
        if unknown or (alone and "hang" in order.kinds):
            fitting = [kind for kind in KINDS if not (alone and kind == "hang")]
            raise ConfigError(f"--kinds {','.join(order.kinds)}: this run can have {', '.join(fitting)}")

    def carry_out(self) -> Report:
        """Run both and compare them. Raises LaunchError when one of them does not finish."""
        calm, hurt = (RunDirectory(self._directory / name) for name in ("undisturbed", "disturbed"))
        self._say(f"the undisturbed run, in {calm.path}")
        began = time.time()
        self._finish(self._start(calm), calm)
        cold = next(iter(_rows(calm)))["time"] - began
        steps = max(_losses(calm))
        self._say(f"{steps} steps, first after {cold:.1f} s; now with {self._order.kills} failures")
        began = time.time()
        failures = self._disturb(hurt, self._due(steps))
        wall = time.time() - began
        return self._report(calm, hurt, failures, cold, wall)

    def _due(self, steps: int) -> list[tuple[int, str]]:
        """(step, kind) of each failure: one within each of as many equal stretches of the run."""
        stretch = (steps - 1) / self._order.kills
        return [
            (int(index * stretch + self._draw.uniform(0.1, 0.9) * stretch), self._draw.choice(self._order.kinds))
            for index in range(self._order.kills)
        ]

    def _disturb(self, run: RunDirectory, due: Sequence[tuple[int, str]]) -> list[Injected]:
        driver = self._start(run)
        found: list[Injected] = []
        for step, kind in due:
            driver = self._wait(run, driver, lambda now, step=step: now[1] >= max(step, 1))  # type: ignore[misc]
            if driver.poll() is not None:
                self._say(f"{len(due) - len(found)} failures came too late: the run had finished")
                break
            KINDS[kind](Victim(run, driver, self._draw))
            at, attempt = time.time(), last_attempt(run)
            reached = steps_done(run)[1]
            driver = self._wait(run, driver, lambda now, attempt=attempt: now[0] > attempt)  # type: ignore[misc]
            recovered = next((row["time"] for row in _rows(run) if row["attempt"] > attempt), None)
            if recovered is None:
                self._say(f"{kind} after step {reached}: the run had just finished")
                break
            found.append(Injected(kind, reached, recovered - at))
            self._say(f"{kind} after step {reached}: next step {recovered - at:.1f} s later")
        self._finish(driver, run)
        return found

    def _start(self, run: RunDirectory) -> subprocess.Popen[str]:
        place = (f"run.dir={run.path.parent}", f"run.name={run.name}", f"failures.hang={self._order.hang}")
        command = [sys.executable, "-m", "llm_training_toolkit", "train", str(self._order.config)]
        run.path.parent.mkdir(parents=True, exist_ok=True)
        log = (run.path.parent / f"{run.name}.log").open("a")
        return subprocess.Popen(
            [*command, *self._order.overrides, *place, *_OVERRIDES], stdout=log, stderr=subprocess.STDOUT, text=True
        )

    def _wait(
        self, run: RunDirectory, driver: subprocess.Popen[str], reached: Callable[[tuple[int, int]], bool]
    ) -> subprocess.Popen[str]:
        """Wait until (attempt, step) is reached, or the run has finished; a driver that was killed is started again."""
        starts, before = 0, steps_done(run)
        while not reached(now := steps_done(run)):
            if now != before:
                starts, before = 0, now
            if driver.poll() == 0:
                break
            if driver.poll() is not None:
                starts += 1
                if starts > _STARTS_AGAIN:
                    raise LaunchError(f"the run does not come up again: see {run.path.parent / run.name}.log")
                driver = self._start(run)
            time.sleep(_LOOK_EVERY)
        return driver

    def _finish(self, driver: subprocess.Popen[str], run: RunDirectory) -> None:
        if self._wait(run, driver, lambda _now: False).wait() != 0:
            raise LaunchError(f"the run did not finish: see {run.path.parent / run.name}.log")

    def _report(
        self, calm: RunDirectory, hurt: RunDirectory, failures: Sequence[Injected], cold: float, wall: float
    ) -> Report:
        lines = {run.name: fetched_along(run, stretches(run, _newest(run).name)) for run in (calm, hurt)}
        epochs = [stream.sequences for stream in Receipt.from_json(hurt.receipt.read_text()).streams]
        count = compare(lines[hurt.name], lines[calm.name], epochs)
        mine, wanted = _losses(hurt), _losses(calm)
        files = [read_manifest(_newest(run)).files for run in (hurt, calm)]
        return Report(
            run=str(hurt.path),
            seed=self._order.seed,
            steps=max(wanted),
            failures=tuple(failures),
            sequences_missing=count.missing,
            sequences_doubled=count.doubled,
            steps_repeated=len(_rows(hurt)) - len(mine),
            max_loss_difference=max(abs(mine.get(step, float("inf")) - loss) for step, loss in wanted.items()),
            weights_equal=files[0] == files[1],
            cold_start_seconds=cold,
            wall_seconds=wall,
            goodput=goodput(hurt),
            goodput_undisturbed=goodput(calm),
        )


def lines_of(report: Report) -> list[str]:
    """A report for a person."""
    several = [f"  {each.kind:<10} step {each.step:>7}  {each.seconds_to_recover:6.1f} s" for each in report.failures]
    return [
        f"{len(report.failures)} failures in {report.steps} steps, and the seconds until the next step was done",
        *several,
        f"a cold start takes {report.cold_start_seconds:.1f} s",
        f"sequences missing: {report.sequences_missing}, doubled: {report.sequences_doubled}",
        f"steps repeated: {report.steps_repeated}",
        f"largest difference of a loss: {report.max_loss_difference:g}; final weights "
        + ("bit for bit the same" if report.weights_equal else "not bit for bit the same"),
        f"undisturbed: {in_words(report.goodput_undisturbed)}",
        f"disturbed:   {in_words(report.goodput)}; {report.wall_seconds:.1f} s by the clock outside",
    ]


def _newest(run: RunDirectory) -> Path:
    found = newest(run.checkpoints)
    if found is None:
        raise LaunchError(f"{run.path} has no checkpoint")
    return found


def _rows(run: RunDirectory) -> list[dict[str, Any]]:
    """Every row of a step, in order."""
    if not run.metrics.exists():
        return []
    lines = [line for line in run.metrics.read_text().splitlines() if line.endswith("}")]
    return [row for row in map(json.loads, lines) if "train/loss" in row]


def _losses(run: RunDirectory) -> dict[int, float]:
    """The loss of each step; of several attempts the last counts."""
    return {int(row["step"]): float(row["train/loss"]) for row in _rows(run)}
