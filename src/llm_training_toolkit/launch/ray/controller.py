"""Controller of a run: starts one worker group after another, each from the newest checkpoint, until the run ends.

A group ends with the run, by a drain (resize or preempted node), or by a failure. The next group gets as many workers
as fit.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llm_training_toolkit.checkpoint import find_latest_checkpoint
from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.distributed.events import WarningEvent
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.capacity import CapacityWaiter
from llm_training_toolkit.launch.ray.failure_policy import (
    AttemptFailure,
    diagnose_failure,
    failure_count,
    find_abort_reason,
    find_counted_failures,
    find_excluded_nodes,
    find_restart_pause,
)
from llm_training_toolkit.launch.ray.resources import ClusterNode, schedulable_nodes
from llm_training_toolkit.launch.ray.worker_group import RunSpec, WorkerGroup, WorkerGroupResult, WorkerGroupSpec
from llm_training_toolkit.monitoring.console import Console
from llm_training_toolkit.monitoring.logs import read_last_lines
from llm_training_toolkit.plan.problem import format_plural
from llm_training_toolkit.runs.attempts import begin_attempt, end_attempt, find_last_attempt, read_attempt_record
from llm_training_toolkit.runs.directory import parse_checkpoint_name
from llm_training_toolkit.runs.goodput import get_process_start_time
from llm_training_toolkit.runs.json_lines import read_newest_rows
from llm_training_toolkit.runs.storage.open import storage_errors
from llm_training_toolkit.runs.storage.s3_client import StorageError

_POLL_SECONDS = 0.5
_RELEASE_TIMEOUT_SECONDS = 10.0  # for ended workers' resources to be freed, before a group smaller than possible starts
_LOG_TAIL_LINES = 10
_RANK_FAILURE_KINDS = ("raised", "killed")  # explained by the rank's own log
_MAX_REMEDIED_FAILURES = 20  # uncounted, since the next attempt differs; more than any micro-batch can be halved


class TrainController:
    """Controller of one start of a run: one `TorchTrainer.fit()` after another, none of which Ray restarts."""

    def __init__(self, run_spec: RunSpec, console: Console) -> None:
        self._run_spec, self._console = run_spec, console
        self._run, self._resource_request = run_spec.run, run_spec.resource_request
        self._stop = False
        self._group: WorkerGroup | None = None
        self._last_previous_attempt = find_last_attempt(run_spec.run)
        self._reported_nodes: set[str] = set()
        self._remedied_count = 0

    def request_stop(self) -> None:
        """Stop after the current step, with a checkpoint. Safe in a signal handler."""
        self._stop = True
        if self._group is not None:
            self._group.request_stop(StopRequest.STOP)

    def resolve_rung(self, step: int, stop_request: StopRequest) -> None:
        """Send the decision on a trial that waits after `step`."""
        if self._group is not None:
            self._group.resolve_rung(step, stop_request)

    def run_training(self) -> dict[str, Any]:
        """Train to the end or a stop; return `{"status", "step"}`. Raises ToolkitError, LaunchError with the cause."""
        try:
            return self._run_worker_groups()
        finally:
            self._run_spec.autoscaler.cancel_request()

    def _run_worker_groups(self) -> dict[str, Any]:
        size, requested_at = 0, get_process_start_time()
        while True:
            capacity = self._wait_for_capacity()
            if capacity is None:
                return self._build_stopped_result()
            requested_at = requested_at or time.time()  # the first group is requested by the command
            previous_size, (size, unschedulable) = size, capacity
            excluded = self._excluded_nodes()
            self._report_scaling(
                previous_size, size, {node.address: excluded.get(node.address, "") for node in unschedulable}
            )
            self._run.check_lock()
            previous_attempt = find_last_attempt(self._run)
            self._group = WorkerGroup(
                WorkerGroupSpec(self._run_spec, size, unschedulable, frozenset(excluded), requested_at), self._console
            )
            if self._stop:  # requested while the group was being created
                self.request_stop()
            group_result = self._group.run_workers()
            requested_at = 0.0
            self._refresh_run_files()
            if group_result.result is None:
                self._run.check_lock()  # the newest attempt may be of a run that was begun anew
                self._handle_failure(group_result, previous_attempt, size)
            elif group_result.result["status"] != "drained":
                return group_result.result
            if self._stop:
                return self._build_stopped_result()

    def _refresh_run_files(self) -> None:
        """Fetch the files that the ranks of a run in a store wrote. Raises LaunchError if the store does not answer."""
        storage = self._run.storage
        with storage_errors():
            storage.refresh_directory(self._run.path)
            storage.fetch_file(self._run.metrics_path)

    def _wait_for_capacity(self) -> tuple[int, tuple[ClusterNode, ...]] | None:
        """Return the number of workers to start and the nodes to avoid, or None after a stop request.

        Raises LaunchError unless the fewest workers fit within `cluster.resource_timeout`.
        """
        is_first_group, excluded = self._group is None, self._excluded_nodes()
        waiting = CapacityWaiter(
            self._run_spec.config, self._resource_request, self._run_spec.autoscaler, self._console
        )
        while not self._stop:
            alive = nodes.alive_nodes()
            schedulable = schedulable_nodes(nodes.reachable_nodes(alive), self._resource_request, excluded)
            fitting = self._resource_request.count_fitting_workers(node.free for node in schedulable)
            are_resources_released = is_first_group or waiting.elapsed_seconds > _RELEASE_TIMEOUT_SECONDS
            if fitting >= self._resource_request.min_workers and (
                are_resources_released
                or fitting >= self._resource_request.count_fitting_workers(node.total for node in schedulable)
            ):
                return fitting, tuple(node for node in alive if node not in schedulable)
            # Nodes that a run lost may return; the missing nodes of a new run can only come from an autoscaler.
            waiting.poll_autoscaler(
                alive, schedulable, quietly=not are_resources_released, nodes_may_return=not is_first_group
            )
            time.sleep(_POLL_SECONDS)
        return None

    def _report_scaling(self, previous_size: int, size: int, excluded_causes: Mapping[str, str]) -> None:
        """Print the number of workers if it is news, and newly excluded nodes (`excluded_causes` by address)."""
        for address, cause in excluded_causes.items():
            if cause and address not in self._reported_nodes:
                self._reported_nodes.add(address)
                self._show_warning(f"node {address} is excluded after two failures; the last: {cause}")
        if previous_size not in {0, size}:
            self._console.print_line(f"restarting with {format_plural(size, 'worker')} instead of {previous_size}")
        elif not previous_size and self._resource_request.min_workers < self._resource_request.max_workers:
            limits = f"{self._resource_request.min_workers} to {self._resource_request.max_workers}"
            self._console.print_line(f"starting with {format_plural(size, 'worker')} of {limits}")

    def _handle_failure(self, group_result: WorkerGroupResult, previous_attempt: int, size: int) -> None:
        """Record and report the failure. Raises LaunchError if no other group may follow."""
        attempt = find_last_attempt(self._run)
        has_begun = attempt > previous_attempt
        step = self._find_failed_step(attempt) if has_begun else 1 + self._get_latest_checkpoint_step()
        failure = replace(diagnose_failure(group_result.evidence, step), starting=not group_result.evidence.has_stepped)
        try:
            if not has_begun:  # the group failed before it began an attempt
                record = {"host": socket.gethostname(), "pid": os.getpid(), "workers": size}
                attempt = begin_attempt(self._run, record)
            end_attempt(self._run, attempt, "failed", error=failure.cause, failure=failure.to_json())
        except OSError as error:
            raise LaunchError(
                self._format_final_error(f"{failure.cause}; the attempt record could not be written ({error})")
            ) from error
        self._show_log_tail(failure, attempt)
        if self._stop:
            self._show_warning(failure.cause)
        elif not failure.is_counted:
            self._handle_uncounted_failure(failure)
        else:
            self._handle_counted_failure(failure)

    def _show_log_tail(self, failure: AttemptFailure, attempt: int) -> None:
        """Print the log tail of a rank that died or raised, since the log may be on another machine."""
        if failure.rank is None or failure.kind not in _RANK_FAILURE_KINDS:
            return
        log = self._run.get_log_dir(attempt) / f"rank_{failure.rank}.log"
        with suppress(StorageError):
            self._run.storage.fetch_file(log)
        for line in read_last_lines(log, _LOG_TAIL_LINES):
            self._console.print_line(f"  {log.name}: {line}")

    def _handle_uncounted_failure(self, failure: AttemptFailure) -> None:
        self._remedied_count += failure.helped
        if self._remedied_count > _MAX_REMEDIED_FAILURES:
            raise LaunchError(self._format_final_error(failure.cause))
        self._show_warning(failure.cause)

    def _handle_counted_failure(self, failure: AttemptFailure) -> None:
        failures, last_saving_attempt = self._read_failures(), self._find_saving_attempt()
        abort_reason = find_abort_reason(
            failures, last_saving_attempt, self._run_spec.config.failures, self._avoidable_nodes()
        )
        if abort_reason:
            raise LaunchError(self._format_final_error(abort_reason))
        count = (
            f"failure {failure_count(failures, last_saving_attempt)} of "
            f"{self._run_spec.config.failures.max_failures} without a checkpoint in between"
        )
        pause = find_restart_pause(failures)
        when = f"in {pause:.0f} s " if pause else ""
        self._show_warning(f"{failure.cause}. Restarting {when}from the latest checkpoint ({count})")
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._stop:
            time.sleep(_POLL_SECONDS)

    def _format_final_error(self, why: str) -> str:
        logs = self._run.storage.get_uri(self._run.path / "logs")
        return f"{why}; the same command resumes from the latest checkpoint. Logs: {logs}"

    def _read_failures(self) -> dict[int, AttemptFailure]:
        numbers = range(1, find_last_attempt(self._run) + 1)
        return find_counted_failures({number: read_attempt_record(self._run, number) for number in numbers})

    def _excluded_nodes(self) -> dict[str, str]:
        return find_excluded_nodes(self._read_failures(), self._last_previous_attempt)

    def _avoidable_nodes(self) -> set[str]:
        """Return the excluded addresses that the next workers can do without."""
        excluded = self._excluded_nodes()
        usable = (
            schedulable_nodes(nodes.reachable_nodes(nodes.alive_nodes()), self._resource_request, excluded)
            if excluded
            else []
        )
        return excluded.keys() - {node.address for node in usable}

    def _find_saving_attempt(self) -> int:
        """Return the attempt that wrote the newest complete checkpoint, 0 if there is none."""
        directory = find_latest_checkpoint(self._run.checkpoints_dir)
        step_and_attempt = parse_checkpoint_name(directory) if directory else None
        return step_and_attempt[1] if step_and_attempt else 0

    def _find_failed_step(self, attempt: int) -> int:
        """Return the failed step of an attempt: the one after its last recorded step, else after the checkpoint."""
        rows = [
            row
            for row in read_newest_rows(self._run.metrics_path)
            if row.get("attempt") == attempt and "train/loss" in row
        ]
        return 1 + (int(rows[-1]["step"]) if rows else self._get_latest_checkpoint_step())

    def _get_latest_checkpoint_step(self) -> int:
        directory = find_latest_checkpoint(self._run.checkpoints_dir)
        step_and_attempt = parse_checkpoint_name(directory) if directory else None
        return step_and_attempt[0] if step_and_attempt else 0

    def _build_stopped_result(self) -> dict[str, Any]:
        return {"status": "stopped", "step": self._get_latest_checkpoint_step()}

    def _show_warning(self, message: str) -> None:
        self._console.show_event(WarningEvent(message))
