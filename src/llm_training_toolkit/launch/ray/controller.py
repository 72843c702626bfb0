"""One group of workers after another, each from the newest checkpoint, until the run ends.

A group ends because the run does, because the ranks left (their number changes, or a node is taken away), or because
something failed. Then the next one takes as many workers as there is room for.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llm_training_toolkit.checkpoint import newest
from llm_training_toolkit.distributed.context import Wish
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.capacity import Waiting
from llm_training_toolkit.launch.ray.failure_cause import diagnose
from llm_training_toolkit.launch.ray.failure_policy import Failure, failures_of, nodes_to_leave_out, spent, why_end
from llm_training_toolkit.launch.ray.resources import Node, usable
from llm_training_toolkit.launch.ray.worker_group import Assignment, Ended, Group, Job
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import last_lines
from llm_training_toolkit.runs.attempts import attempt_record, end_attempt, last_attempt
from llm_training_toolkit.runs.directory import checkpoint_place
from llm_training_toolkit.runs.goodput import command_began
from llm_training_toolkit.runs.metrics_log import newest_rows
from llm_training_toolkit.runs.storage import StorageError, reached, storage_of

_LOOK_EVERY = 0.5
"""Seconds between two looks for room."""
_SETTLES_WITHIN = 10.0
"""Seconds that what ended workers held may take to be free again, before fewer workers start than have room."""
_LINES_SHOWN = 10
"""Lines of a failed rank's log that are shown."""
_OF_A_RANK = ("raised", "killed")
"""Kinds of failures that a rank's own log tells of."""
_MOST_HELPED = 20
"""Failures that do not count because the next attempt does differently: more than any micro-batch has halves."""


class Groups:
    """The workers of one start of a run."""

    def __init__(self, job: Job, console: Console) -> None:
        self._job, self._run, self._wanted, self._console = job, job.run, job.wanted, console
        self._stop = False
        self._group: Group | None = None
        self._began_after = last_attempt(job.run)
        self._named: set[str] = set()
        self._helped = 0

    def stop(self) -> None:
        """Stop after the step that is being done, with a checkpoint; also from a signal's handler."""
        self._stop = True
        if self._group is not None:
            self._group.want(Wish.STOP)

    def answer(self, step: int, wish: Wish) -> None:
        """Say whether a trial that waits after a step goes on."""
        if self._group is not None:
            self._group.answer(step, wish)

    def run(self) -> dict[str, Any]:
        """Train to the end or to a stop: `{"status", "step"}`. Raises ToolkitError, LaunchError with the cause."""
        try:
            return self._one_after_another()
        finally:
            self._job.autoscaler.withdraw()

    def _one_after_another(self) -> dict[str, Any]:
        size, began = 0, command_began()
        while True:
            found = self._room()
            if found is None:
                return self._stopped()
            began = began or time.time()  # the first workers are asked for by the command
            before, (size, avoid) = size, found
            left_out = self._left_out()
            self._say_what_changes(before, size, {node.address: left_out.get(node.address, "") for node in avoid})
            before_attempt = last_attempt(self._run)
            self._group = Group(Assignment(self._job, size, avoid, frozenset(left_out), began), self._console)
            if self._stop:  # asked for while the group came about
                self.stop()
            ended = self._group.run()
            began = 0.0
            self._look()
            if ended.result is None:
                self._after_failure(ended, before_attempt, size)
            elif ended.result["status"] != "left":
                return ended.result
            if self._stop:
                return self._stopped()

    def _look(self) -> None:
        """See what the ranks of a run in a store have written. Raises LaunchError when it does not answer."""
        storage = storage_of(self._run.path)
        with reached():
            storage.look(self._run.path)
            storage.bring(self._run.metrics)

    def _room(self) -> tuple[int, tuple[Node, ...]] | None:
        """How many workers start now, and the nodes to keep off; None when a stop was asked for meanwhile.

        Raises LaunchError when there is no room for the fewest within `cluster.wait`, or never can be.
        """
        is_first, left_out = self._group is None, self._left_out()
        waiting = Waiting(self._job.config, self._wanted, self._job.autoscaler, self._console)
        while not self._stop:
            living = nodes.living_nodes()
            good = usable(nodes.answering(living), self._wanted, left_out)
            now = self._wanted.room(node.free for node in good)
            settled = is_first or waiting.seconds > _SETTLES_WITHIN
            if now >= self._wanted.fewest and (settled or now >= self._wanted.room(node.total for node in good)):
                return now, tuple(node for node in living if node not in good)
            # Nodes that a run had may come back; those that a new one lacks come from an autoscaler or not at all.
            waiting.go_on(living, good, quietly=not settled, nodes_may_return=not is_first)
            time.sleep(_LOOK_EVERY)
        return None

    def _say_what_changes(self, before: int, size: int, avoided: Mapping[str, str]) -> None:
        """Name the number of workers where it is news, and the nodes left out for what they did (`avoided`)."""
        for address, cause in avoided.items():
            if cause and address not in self._named:
                self._named.add(address)
                self._warn(f"node {address} has failed twice and is left out from now on; last: {cause}")
        if before not in {0, size}:
            self._console.say(f"going on with {size} workers instead of {before}")
        elif not before and self._wanted.fewest < self._wanted.most:
            self._console.say(f"starting with {size} workers of {self._wanted.fewest} to {self._wanted.most}")

    def _after_failure(self, ended: Ended, before_attempt: int, size: int) -> None:
        """Write the failure down, and say it. Raises LaunchError when no other group may follow."""
        attempt = last_attempt(self._run)
        began = attempt > before_attempt
        step = self._step(attempt) if began else 1 + self._newest_step()
        failure = replace(diagnose(ended.seen, step), starting=not ended.seen.stepped)
        try:
            if not began:  # it did not come as far as that
                facts = {"host": socket.gethostname(), "pid": os.getpid(), "workers": size}
                attempt = storage_of(self._run.path).begin_attempt(facts)
            end_attempt(self._run, attempt, "failed", error=failure.cause, failure=failure.to_json())
        except OSError as error:
            raise LaunchError(self._ending(f"{failure.cause}; it could not be written down ({error})")) from error
        self._show_log(failure, attempt)
        if self._stop:
            self._warn(failure.cause)
        elif not failure.counts:
            self._not_counted(failure)
        else:
            self._counted(failure)

    def _show_log(self, failure: Failure, attempt: int) -> None:
        """The end of the log of a rank that died or raised: its log may be on another machine's screen otherwise."""
        if failure.rank is None or failure.kind not in _OF_A_RANK:
            return
        log = self._run.logs(attempt) / f"rank_{failure.rank}.log"
        with suppress(StorageError):
            storage_of(log).bring(log)
        for line in last_lines(log, _LINES_SHOWN):
            self._console.say(f"  {log.name}: {line}")

    def _not_counted(self, failure: Failure) -> None:
        self._helped += failure.helped
        if self._helped > _MOST_HELPED:
            raise LaunchError(self._ending(failure.cause))
        self._warn(failure.cause)

    def _counted(self, failure: Failure) -> None:
        failures, saved_by = self._failures(), self._saved_by()
        end = why_end(failures, saved_by, self._job.config.failures, self._avoided())
        if end:
            raise LaunchError(self._ending(end))
        count = (
            f"failure {spent(failures, saved_by)} of {self._job.config.failures.max} without a checkpoint in between"
        )
        self._warn(f"{failure.cause}. New workers go on from the newest checkpoint ({count})")

    def _ending(self, why: str) -> str:
        logs = storage_of(self._run.path).address(self._run.path / "logs")
        return f"{why}; the same command goes on from the newest checkpoint. Logs: {logs}"

    def _failures(self) -> dict[int, Failure]:
        numbers = range(1, last_attempt(self._run) + 1)
        return failures_of({number: attempt_record(self._run, number) for number in numbers})

    def _left_out(self) -> dict[str, str]:
        return nodes_to_leave_out(self._failures(), self._began_after)

    def _avoided(self) -> set[str]:
        """Addresses left out that the next workers can do without."""
        left_out = self._left_out()
        taken = usable(nodes.answering(nodes.living_nodes()), self._wanted, left_out) if left_out else []
        return left_out.keys() - {node.address for node in taken}

    def _saved_by(self) -> int:
        """The attempt that wrote the newest complete checkpoint; 0 = there is none."""
        directory = newest(self._run.checkpoints)
        place = checkpoint_place(directory) if directory else None
        return place[1] if place else 0

    def _step(self, attempt: int) -> int:
        """The step that an attempt was at when it ended: after the last one it recorded, or after where it began."""
        rows = [row for row in newest_rows(self._run.metrics) if row.get("attempt") == attempt and "train/loss" in row]
        return 1 + (int(rows[-1]["step"]) if rows else self._newest_step())

    def _newest_step(self) -> int:
        directory = newest(self._run.checkpoints)
        place = checkpoint_place(directory) if directory else None
        return place[0] if place else 0

    def _stopped(self) -> dict[str, Any]:
        return {"status": "stopped", "step": self._newest_step()}

    def _warn(self, message: str) -> None:
        self._console.show({"kind": "warning", "message": message})
