"""Faults of a drill: each is real and hits a run on this machine, whose files name the processes."""

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
from llm_training_toolkit.runs.json_lines import read_newest_rows

_POLL_SECONDS = 0.002  # writing a checkpoint may take only ten of these
_WAIT_TIMEOUT_SECONDS = 300.0  # for what a fault needs or causes: a second checkpoint, the end of an attempt


class FaultTarget(NamedTuple):
    """Target of a fault: a run at work, the command that drives it, and the drill's own cluster, if any."""

    run: RunDirectory
    driver: Popen[str]
    rng: random.Random
    cluster: LocalCluster | None

    @property
    def local_cluster(self) -> LocalCluster:
        """The drill's own cluster, for faults that need one."""
        assert self.cluster is not None, "refused before"
        return self.cluster

    def pick_rank_process(self) -> int:
        """Return the process id of a randomly drawn rank."""
        processes: list[int] = read_attempt_record(self.run, find_last_attempt(self.run))["processes"]
        return self.rng.choice(processes)

    def pick_node(self) -> str:
        """Return the address of the node of a randomly drawn rank."""
        ranks: list[dict[str, str]] = read_attempt_record(self.run, find_last_attempt(self.run))["ranks"]
        return self.rng.choice(ranks)["node"]

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition while the driver runs. Return whether it came true."""
        end = time.monotonic() + _WAIT_TIMEOUT_SECONDS
        while self.driver.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def wait_for_attempt_end(self) -> None:
        """Wait until the current attempt has ended."""
        attempt = find_last_attempt(self.run)
        self.wait_until(lambda: read_attempt_record(self.run, attempt).get("state", "running") != "running")


def _kill_process(process: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself
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
    """Measure the duration of one checkpoint, then kill a rank during the next one or shortly after it."""
    victim.wait_until(lambda: is_writing_checkpoint(victim.run))
    write_start = time.monotonic()
    victim.wait_until(lambda: not is_writing_checkpoint(victim.run))
    takes = time.monotonic() - write_start
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
    """Limit the size of a rank's files to half of its smallest checkpoint file, as a quota would."""
    victim.wait_until(lambda: bool(list_complete_checkpoints(victim.run.checkpoints_dir)))
    files = list_complete_checkpoints(victim.run.checkpoints_dir)[-1].glob("*.safetensors")
    half = min(file.stat().st_size for file in files) // 2
    resource.prlimit(victim.pick_rank_process(), resource.RLIMIT_FSIZE, (half, half))
    victim.wait_for_attempt_end()


def _kill_node(victim: FaultTarget) -> None:
    victim.local_cluster.replace_node(victim.pick_node())


def _preempt_node(victim: FaultTarget) -> None:
    node = victim.local_cluster.drain_node(victim.pick_node())
    victim.wait_for_attempt_end()
    victim.local_cluster.kill_node(node)


def _kill_head(victim: FaultTarget) -> None:
    victim.local_cluster.kill_head()
    victim.wait_until(lambda: False)
    victim.local_cluster.close()
    victim.local_cluster.start_cluster()


def is_writing_checkpoint(run: RunDirectory) -> bool:
    """Return whether the current attempt has begun a checkpoint that is not complete."""
    attempt = find_last_attempt(run)
    return any(not (path / "manifest.json").exists() for path in run.checkpoints_dir.glob(f"step_*_a{attempt}"))


class FaultKind(NamedTuple):
    """Kind of fault."""

    inject: Callable[[FaultTarget], str | None]
    """Injects the fault and returns once it has happened, with the name of the checkpoint it damaged, if any."""
    description: str
    needs: Literal["", "ray", "nodes"] = ""
    """Requirement: "ray" for workers on Ray, "nodes" for the drill's own cluster."""


FAULT_KINDS = {
    "worker": FaultKind(_kill_worker, "SIGKILL to the process of a rank"),
    "driver": FaultKind(_kill_driver, "SIGKILL to the command; it is given again"),
    "stop": FaultKind(_stop_driver, "SIGTERM to the command, which saves and ends; it is given again"),
    "during_checkpoint": FaultKind(
        _kill_during_checkpoint, "SIGKILL to a rank while a checkpoint is written, or just after"
    ),
    "corrupt_checkpoint": FaultKind(_truncate_checkpoint, "the newest checkpoint loses its end, and a rank is killed"),
    "storage": FaultKind(_limit_file_size, "half-way through the next checkpoint a rank's files may grow no more"),
    "hang": FaultKind(_hang_worker, "SIGSTOP to a rank", "ray"),
    "node": FaultKind(_kill_node, "a node is lost; another one comes", "nodes"),
    "preemption": FaultKind(
        _preempt_node, "a node is drained, another one comes, and the node goes when its ranks have left", "nodes"
    ),
    "head": FaultKind(
        _kill_head, "the head of the cluster is lost; another cluster comes, the command is given again", "nodes"
    ),
}


def read_latest_step(run: RunDirectory) -> tuple[int, int]:
    """Return (attempt, step) of the newest step row; zeros before the first."""
    rows = [row for row in read_newest_rows(run.metrics_path) if "train/loss" in row]
    return (int(rows[-1]["attempt"]), int(rows[-1]["step"])) if rows else (0, 0)
