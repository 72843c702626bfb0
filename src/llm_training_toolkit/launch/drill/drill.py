"""Drill: run once undisturbed and once with randomly drawn faults, then compare the two."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llm_training_toolkit.config import Config, load_config
from llm_training_toolkit.config.uri import is_uri
from llm_training_toolkit.errors import ConfigError, LaunchError
from llm_training_toolkit.launch.drill.faults import FAULT_KINDS, FaultTarget, is_writing_checkpoint, read_latest_step
from llm_training_toolkit.launch.drill.local_cluster import LocalCluster
from llm_training_toolkit.launch.drill.report import (
    DrillReport,
    DrillTimings,
    InjectedFault,
    build_report,
    find_undamaged_checkpoint,
    read_step_rows,
)
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.setup.machine import check_cpu_count

_POLL_SECONDS = 0.1
_MAX_RESTARTS = 5  # in a row without a step in between, before the drill gives up
_RECOVERY_TIMEOUT_SECONDS = 1200.0  # without a step after a fault, before the drill gives up
# For both runs. Faults come close together in a drill and must not end the run.
_OVERRIDES = (
    "failures.log_samples=true",
    "failures.max_failures=100000",
    "failures.max_same_step_failures=100000",
    "export.at_end=false",
)
PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class DrillSpec:
    """Specification of a drill."""

    config: Path
    overrides: Sequence[str]
    kills: int
    kinds: Sequence[str]
    seed: int
    hang: str
    """`failures.hang_timeout` of both runs, shorter than the default of ten minutes."""


class DrillRunner:
    """Runs a drill in its own directory beside the run's."""

    def __init__(self, order: DrillSpec, say: PrintLine) -> None:
        """Load the configuration. Raises ConfigError for faults that the run cannot have."""
        self._order, self._say, self._draw = order, say, random.Random(order.seed)  # noqa: S311 - to be repeated
        self._given = (*order.overrides, f"failures.hang_timeout={order.hang}", *_OVERRIDES)
        self._config = load_config(order.config, self._given)
        _check_fault_kinds(self._config, order.kinds)
        parent = Path(self._config.run.dir).expanduser().absolute()
        self._directory = parent / f"{self._config.run.name}-drill-{time.strftime('%Y%m%d-%H%M%S')}"
        self._cluster: LocalCluster | None = None
        self._driver: subprocess.Popen[str] | None = None
        self._resolved: tuple[str, ...] = ()

    def run_drill(self) -> DrillReport:
        """Run both and compare them. Raises LaunchError if one of them does not finish."""
        calm, hurt = (RunDirectory(self._directory / name) for name in ("undisturbed", "disturbed"))
        with self._manage_processes():
            self._say(f"the undisturbed run, in {calm.path}")
            started_at = time.time()
            self._start_driver(calm)
            self._wait_for_finish(calm)
            self._resolved = _read_resolved_values(calm)
            steps, cold = read_step_rows(calm)[-1]["step"], read_step_rows(calm)[0]["time"] - started_at
            self._say(f"{steps} steps, first after {cold:.1f} s; now with {self._order.kills} failures")
            again = time.time()
            failures = self._run_with_faults(
                hurt, schedule_faults(steps, self._order.kills, self._order.kinds, self._draw)
            )
            clock = DrillTimings(cold, again - started_at, time.time() - again)
        return build_report(self._order.seed, calm, hurt, failures, clock)

    @contextmanager
    def _manage_processes(self) -> Iterator[None]:
        """Start a local cluster if a fault needs one. Stop it and the driver at the drill's end, errors included."""
        if any(FAULT_KINDS[kind].needs == "nodes" for kind in self._order.kinds):
            cluster_config = self._config.cluster
            there = len(os.sched_getaffinity(0)) // cluster_config.cpus_per_worker
            self._cluster = LocalCluster(min(cluster_config.max_workers, there), cluster_config.cpus_per_worker)
        try:
            yield
        finally:
            if self._driver is not None and self._driver.poll() is None:
                self._driver.terminate()
                self._driver.wait()
            if self._cluster is not None:
                self._cluster.close()

    def _run_with_faults(self, run: RunDirectory, due: Sequence[tuple[int, str]]) -> list[InjectedFault]:
        found: list[InjectedFault] = []
        driver = self._start_driver(run)
        for step, kind in due:
            driver = self._wait_for_progress(run, lambda now, step=step: now[1] >= max(step, 1))  # type: ignore[misc]
            if driver.poll() is not None:
                self._say(f"{len(due) - len(found)} failures came too late: the run had finished")
                break
            damaged = FAULT_KINDS[kind].inject(FaultTarget(run, driver, self._draw, self._cluster))
            at, attempt, half = time.time(), find_last_attempt(run), is_writing_checkpoint(run)
            newest, reached = find_undamaged_checkpoint(run, damaged), read_latest_step(run)[1]
            self._wait_for_progress(run, lambda now, attempt=attempt: now[0] > attempt, at + _RECOVERY_TIMEOUT_SECONDS)  # type: ignore[misc]
            row = next((row for row in read_step_rows(run) if row["attempt"] > attempt), None)
            if row is None:
                self._say(f"{kind} after step {reached}: the run had just finished")
                break
            after = read_attempt_record(run, row["attempt"])
            seconds = row["time"] - at, row["time"] - after["group_began"]
            found.append(InjectedFault(kind, reached, *seconds, newest, after["resumed"], half))
            self._say(f"{kind} after step {reached}: next step {found[-1].seconds_to_recover:.1f} s later")
        self._wait_for_finish(run)
        return found

    def _start_driver(self, run: RunDirectory) -> subprocess.Popen[str]:
        run_overrides = (f"run.dir={run.path.parent}", f"run.name={run.name}")
        command = [sys.executable, "-P", "-m", "llm_training_toolkit", "train", str(self._order.config)]
        environment = os.environ | self._cluster.environment_variables if self._cluster else os.environ
        run.path.parent.mkdir(parents=True, exist_ok=True)
        with _get_log_path(run).open("a") as log:
            self._driver = subprocess.Popen(
                [*command, *self._given, *self._resolved, *run_overrides],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )
        return self._driver

    def _wait_for_progress(
        self, run: RunDirectory, reached: Callable[[tuple[int, int]], bool], until: float = float("inf")
    ) -> subprocess.Popen[str]:
        """Wait until (attempt, step) is reached or the run has finished, and restart a driver that ended.

        Raises LaunchError after too many restarts without a step, or at `until`, in seconds since 1970.
        """
        assert self._driver is not None
        starts, last_progress = 0, read_latest_step(run)
        while not reached(now := read_latest_step(run)):
            if now != last_progress:
                starts, last_progress = 0, now
            if self._driver.poll() == 0:
                break
            if self._driver.poll() is not None:
                starts += 1
                if starts > _MAX_RESTARTS:
                    raise LaunchError(f"the run does not come up again: see {_get_log_path(run)}")
                self._start_driver(run)
            if time.time() > until:
                raise LaunchError(
                    f"no step was done in the {_RECOVERY_TIMEOUT_SECONDS / 60:g} minutes since: see "
                    f"{_get_log_path(run)}"
                )
            time.sleep(_POLL_SECONDS)
        return self._driver

    def _wait_for_finish(self, run: RunDirectory) -> None:
        if self._wait_for_progress(run, lambda _now: False).wait() != 0:
            raise LaunchError(f"the run did not finish: see {_get_log_path(run)}")


def schedule_faults(steps: int, kills: int, kinds: Sequence[str], draw: random.Random) -> list[tuple[int, str]]:
    """Return (step, kind) of each fault: one within each of equal stretches of the run, kinds in equal shares.

    The last stretch stays free for faults that wait for a checkpoint.
    """
    stretch = (steps - 1) / (kills + 1)
    kinds_due: list[str] = []
    while len(kinds_due) < kills:
        kinds_due += draw.sample(kinds, len(kinds))
    return [
        (int(index * stretch + draw.uniform(0.1, 0.9) * stretch), kind) for index, kind in enumerate(kinds_due[:kills])
    ]


def _check_fault_kinds(config: Config, kinds: Sequence[str]) -> None:
    if is_uri(config.run.dir):
        raise ConfigError(f"run.dir = {config.run.dir}: a drill damages files of its runs: name a path")
    fitting = [name for name, kind in FAULT_KINDS.items() if config.cluster.workers != 0 or not kind.needs]
    if not kinds or set(kinds) - set(fitting):
        why = "" if config.cluster.workers else " (hang, node, preemption and head need Ray: cluster.workers)"
        raise ConfigError(f"--faults {','.join(kinds)}: this run can have {', '.join(fitting)}{why}")
    if any(FAULT_KINDS[kind].needs == "nodes" for kind in kinds):
        check_cpu_count(config)


def _get_log_path(run: RunDirectory) -> Path:
    """Return the file with the output of the run's commands."""
    return run.path.parent / f"{run.name}.log"


def _read_resolved_values(run: RunDirectory) -> tuple[str, ...]:
    """Return what `auto` became in a run, as overrides.

    Free memory and a measurement decide it, so a second run could differ from the first by rounding.
    """
    precision = json.loads(run.resolved_config_path.read_text())["train"]["precision"]
    record = read_attempt_record(run, find_last_attempt(run))
    return (
        f"train.precision={precision}",
        f"train.micro_batch_size={record['micro_batch']}",
        f"engine.zero_stage={record['zero']}",
        f"model.activation_checkpointing={record['activation_checkpointing']}",
    )
