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

from llm_training_toolkit.checkpoint import complete
from llm_training_toolkit.launch.drill.local_cluster import OwnCluster
from llm_training_toolkit.runs.attempts import attempt_record, last_attempt
from llm_training_toolkit.runs.directory import RunDirectory
from llm_training_toolkit.runs.metrics_log import newest_rows

_LOOK_EVERY = 0.002
"""Seconds between two looks for a checkpoint that is being written, which may take no longer than ten of them."""
_WAITS = 300.0
"""Seconds to wait for what a failure needs or leads to: a second checkpoint, the end of an attempt."""


class Victim(NamedTuple):
    """A run that works, the command that drives it, and the cluster it is on where that is the drill's own."""

    run: RunDirectory
    driver: Popen[str]
    draw: random.Random
    cluster: OwnCluster | None

    @property
    def own_cluster(self) -> OwnCluster:
        """For failures that need one."""
        assert self.cluster is not None, "refused before"
        return self.cluster

    def rank(self) -> int:
        """The process of a rank drawn by chance."""
        processes: list[int] = attempt_record(self.run, last_attempt(self.run))["processes"]
        return self.draw.choice(processes)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Wait for a condition while the command works; whether it came true."""
        end = time.monotonic() + _WAITS
        while self.driver.poll() is None and time.monotonic() < end:
            if condition():
                return True
            time.sleep(_LOOK_EVERY)
        return False

    def until_attempt_ends(self) -> None:
        """Wait until the present attempt is none that works any more."""
        attempt = last_attempt(self.run)
        self.until(lambda: attempt_record(self.run, attempt).get("state", "running") != "running")


def _kill(process: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, signal.SIGKILL)


def _worker(victim: Victim) -> None:
    _kill(victim.rank())


def _driver(victim: Victim) -> None:
    victim.driver.kill()


def _stop(victim: Victim) -> None:
    victim.driver.terminate()
    victim.until(lambda: False)


def _hang(victim: Victim) -> None:
    os.kill(victim.rank(), signal.SIGSTOP)


def _saving(victim: Victim) -> None:
    """One checkpoint tells how long another one takes; the kill falls into the next one or shortly behind it."""
    victim.until(lambda: being_written(victim.run))
    began = time.monotonic()
    victim.until(lambda: not being_written(victim.run))
    takes = time.monotonic() - began
    victim.until(lambda: being_written(victim.run))
    time.sleep(victim.draw.uniform(0.0, 1.1 * takes))
    _kill(victim.rank())


def _truncated(victim: Victim) -> str:
    victim.until(lambda: len(complete(victim.run.checkpoints)) > 1)
    newest = complete(victim.run.checkpoints)[-1]
    file = victim.draw.choice(sorted(newest.glob("*.safetensors")))
    os.truncate(file, victim.draw.randrange(file.stat().st_size))
    _kill(victim.rank())
    return newest.name


def _storage(victim: Victim) -> None:
    """The kernel lets no file of a rank grow beyond half of what it writes of a checkpoint, as a quota does."""
    victim.until(lambda: bool(complete(victim.run.checkpoints)))
    files = complete(victim.run.checkpoints)[-1].glob("*.safetensors")
    half = min(file.stat().st_size for file in files) // 2
    resource.prlimit(victim.rank(), resource.RLIMIT_FSIZE, (half, half))
    victim.until_attempt_ends()


def _node(victim: Victim) -> None:
    victim.own_cluster.lose_node_of(victim.rank())


def _notice(victim: Victim) -> None:
    node = victim.own_cluster.announce_end_of(victim.rank())
    victim.until_attempt_ends()
    victim.own_cluster.lose(node)


def _head(victim: Victim) -> None:
    victim.own_cluster.lose_head()
    victim.until(lambda: False)
    victim.own_cluster.close()
    victim.own_cluster.start()


def being_written(run: RunDirectory) -> bool:
    """Whether the present attempt has begun a checkpoint that is not complete."""
    attempt = last_attempt(run)
    return any(not (path / "manifest.json").exists() for path in run.checkpoints.glob(f"step_*_a{attempt}"))


class Kind(NamedTuple):
    """A kind of failure."""

    strike: Callable[[Victim], str | None]
    """Returns when the failure is there; the name of a checkpoint that it has damaged."""
    what: str
    needs: Literal["", "ray", "nodes"] = ""
    """Workers on Ray; a cluster of the drill's own."""


KINDS = {
    "worker": Kind(_worker, "SIGKILL to the process of a rank"),
    "driver": Kind(_driver, "SIGKILL to the command; it is given again"),
    "stop": Kind(_stop, "SIGTERM to the command, which saves and ends; it is given again"),
    "saving": Kind(_saving, "SIGKILL to a rank while a checkpoint is written, or just after"),
    "truncated": Kind(_truncated, "the newest checkpoint loses its end, and a rank is killed"),
    "storage": Kind(_storage, "half-way through the next checkpoint a rank's files may grow no more"),
    "hang": Kind(_hang, "SIGSTOP to a rank", "ray"),
    "node": Kind(_node, "a node is lost; another one comes", "nodes"),
    "notice": Kind(
        _notice, "a node is drained, another one comes, and the node goes when its ranks have left", "nodes"
    ),
    "head": Kind(_head, "the head of the cluster is lost; another cluster comes, the command is given again", "nodes"),
}


def steps_done(run: RunDirectory) -> tuple[int, int]:
    """(attempt, step) of the newest row of a step; zeros before the first."""
    rows = [row for row in newest_rows(run.metrics) if "train/loss" in row]
    return (int(rows[-1]["attempt"]), int(rows[-1]["step"])) if rows else (0, 0)
