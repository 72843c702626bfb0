"""The failures of a drill: each real, done to a run that works on this machine, found through its files."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from subprocess import Popen
from typing import Literal, NamedTuple

from llm_training_toolkit.checkpoint import list_complete_checkpoints
from llm_training_toolkit.launch.drill.local_cluster import LocalCluster
from llm_training_toolkit.runs.attempts import find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.metrics_log import read_newest_rows

_POLL_SECONDS = 0.002
"""Seconds between two looks for a checkpoint that is being written, which may take no longer than ten of them."""
_WAIT_TIMEOUT_SECONDS = 300.0
"""Seconds to wait for what a failure needs or leads to: a second checkpoint, the end of an attempt."""


class FaultTarget(NamedTuple):
    """A run that works, the command that drives it, and the cluster it is on where that is the drill's own."""

    run: RunDirectory
    driver: Popen[str]
    rng: random.Random
    cluster: LocalCluster | None

    @property
    def local_cluster(self) -> LocalCluster:
        """For failures that need one."""
        assert self.cluster is not None, "refused before"
        return self.cluster

    def pick_rank_process(self) -> int:
        """The process of a rank drawn by chance."""
        processes: list[int] = read_attempt_record(self.run, find_last_attempt(self.run))["processes"]
        return self.rng.choice(processes)

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition while the command works; whether it came true."""
        end = time.monotonic() + _WAIT_TIMEOUT_SECONDS
        while self.driver.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def wait_for_attempt_end(self) -> None:
        """Wait until the present attempt is none that works any more."""
        attempt = find_last_attempt(self.run)
        self.wait_until(lambda: read_attempt_record(self.run, attempt).get("state", "running") != "running")


def _kill_process(process: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, signal.SIGKILL)


def _kill_worker(victim: FaultTarget) -> None:
    _kill_process(victim.pick_rank_process())


def _kill_driver(victim: FaultTarget) -> None:
    victim.driver.kill()


def _stop_driver(victim: FaultTarget) -> None:
    victim.driver.terminate()
    victim.wait_until(lambda: False)


def _hang_worker(victim: FaultTarget) -> None:
    os.kill(victim.pick_rank_process(), signal.SIGSTOP)


def _kill_during_checkpoint(victim: FaultTarget) -> None:
    """One checkpoint tells how long another one takes; the kill falls into the next one or shortly behind it."""
    victim.wait_until(lambda: is_writing_checkpoint(victim.run))
    began = time.monotonic()
    victim.wait_until(lambda: not is_writing_checkpoint(victim.run))
    takes = time.monotonic() - began
    victim.wait_until(lambda: is_writing_checkpoint(victim.run))
    time.sleep(victim.rng.uniform(0.0, 1.1 * takes))
    _kill_process(victim.pick_rank_process())


def _truncate_checkpoint(victim: FaultTarget) -> str:
    victim.wait_until(lambda: len(list_complete_checkpoints(victim.run.checkpoints_dir)) > 1)
    newest = list_complete_checkpoints(victim.run.checkpoints_dir)[-1]
    file = victim.rng.choice(sorted(newest.glob("*.safetensors")))
    os.truncate(file, victim.rng.randrange(file.stat().st_size))
    _kill_process(victim.pick_rank_process())
    return newest.name


def _limit_file_size(victim: FaultTarget) -> None:
    """The kernel lets no file of a rank grow beyond half of what it writes of a checkpoint, as a quota does."""
    victim.wait_until(lambda: bool(list_complete_checkpoints(victim.run.checkpoints_dir)))
    files = list_complete_checkpoints(victim.run.checkpoints_dir)[-1].glob("*.safetensors")
    half = min(file.stat().st_size for file in files) // 2
    resource.prlimit(victim.pick_rank_process(), resource.RLIMIT_FSIZE, (half, half))
    victim.wait_for_attempt_end()


def _kill_node(victim: FaultTarget) -> None:
    victim.local_cluster.kill_rank_node(victim.pick_rank_process())


def _preempt_node(victim: FaultTarget) -> None:
    node = victim.local_cluster.drain_rank_node(victim.pick_rank_process())
    victim.wait_for_attempt_end()
    victim.local_cluster.kill_node(node)


def _kill_head(victim: FaultTarget) -> None:
    victim.local_cluster.kill_head()
    victim.wait_until(lambda: False)
    victim.local_cluster.close()
    victim.local_cluster.start_cluster()


def is_writing_checkpoint(run: RunDirectory) -> bool:
    """Whether the present attempt has begun a checkpoint that is not complete."""
    attempt = find_last_attempt(run)
    return any(not (path / "manifest.json").exists() for path in run.checkpoints_dir.glob(f"step_*_a{attempt}"))


class FaultKind(NamedTuple):
    """A kind of failure."""

    inject: Callable[[FaultTarget], str | None]
    """Returns when the failure is there; the name of a checkpoint that it has damaged."""
    description: str
    needs: Literal["", "ray", "nodes"] = ""
    """Workers on Ray; a cluster of the drill's own."""


FAULT_KINDS = {
    "worker": FaultKind(_kill_worker, "SIGKILL to the process of a rank"),
    "driver": FaultKind(_kill_driver, "SIGKILL to the command; it is given again"),
    "stop": FaultKind(_stop_driver, "SIGTERM to the command, which saves and ends; it is given again"),
    "saving": FaultKind(_kill_during_checkpoint, "SIGKILL to a rank while a checkpoint is written, or just after"),
    "truncated": FaultKind(_truncate_checkpoint, "the newest checkpoint loses its end, and a rank is killed"),
    "storage": FaultKind(_limit_file_size, "half-way through the next checkpoint a rank's files may grow no more"),
    "hang": FaultKind(_hang_worker, "SIGSTOP to a rank", "ray"),
    "node": FaultKind(_kill_node, "a node is lost; another one comes", "nodes"),
    "notice": FaultKind(
        _preempt_node, "a node is drained, another one comes, and the node goes when its ranks have left", "nodes"
    ),
    "head": FaultKind(
        _kill_head, "the head of the cluster is lost; another cluster comes, the command is given again", "nodes"
    ),
}


def read_latest_step(run: RunDirectory) -> tuple[int, int]:
    """(attempt, step) of the newest row of a step; zeros before the first."""
    rows = [row for row in read_newest_rows(run.metrics_path) if "train/loss" in row]
    return (int(rows[-1]["attempt"]), int(rows[-1]["step"])) if rows else (0, 0)
