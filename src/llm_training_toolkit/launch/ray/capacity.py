"""Capacity of the cluster for a run: requests to its autoscaler, and the wait for resources.

The shortage is reported at once and every 30 s. A hopeless wait raises LaunchError. Of Ray's two autoscalers version 2
counts alone (`RAY_enable_autoscaler_v2=1`; KubeRay and `ray up` use it): version 1 never reports what is infeasible.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import ray.exceptions
from ray.autoscaler.sdk import request_resources

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.section import parse_duration_seconds
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes, private_api
from llm_training_toolkit.launch.ray.resources import ClusterNode, ResourceRequest, Resources, compute_usage_by_others
from llm_training_toolkit.monitoring.console import Console

_REPORT_INTERVAL_SECONDS = 30.0
_DETECTION_TIMEOUT_SECONDS = 10.0  # autoscalers report every 5 s; without a report by then there is none
# For the autoscaler to report infeasibility: it reports every 5 s, and two requests for fewer workers may follow.
_FEASIBILITY_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class AutoscalerStatus:
    """Report of the autoscaler."""

    adding: Mapping[str, int]
    """Number of pending nodes, by type."""
    failed: tuple[str, ...] = ()
    """Failed node launches, in the autoscaler's words."""
    is_infeasible: bool = False
    """True if it can never provide the run's fewest workers."""


class AutoscalerClient:
    """Capacity requests of one run to the autoscaler."""

    def __init__(self, resource_request: ResourceRequest) -> None:
        self._resource_request, self._count = resource_request, resource_request.max_workers
        self._requested: list[dict[str, float]] = []
        self._start_time = time.monotonic()

    def request_capacity(self, used: Iterable[Resources]) -> AutoscalerStatus | None:
        """Request the run's workers on top of the resources `used` by others. Return None without an autoscaler.

        Repeat the call: Ray Train's own request replaces this one every 20 s. A request is met whole or not at all, so
        an infeasible one is followed by one for an eighth fewer workers, down to the fewest.
        """
        if not private_api.has_autoscaler_v2():
            return None
        report = private_api.read_autoscaler_report()
        if report is None:  # the autoscaler of a new cluster may not have reported yet
            is_detectable = time.monotonic() - self._start_time <= _DETECTION_TIMEOUT_SECONDS
            return AutoscalerStatus({}) if is_detectable else None
        is_refused = bool(self._requested) and private_api.count_bundles(self._requested) in report.infeasible
        is_infeasible = is_refused and self._count <= self._resource_request.min_workers
        if is_refused and not is_infeasible:
            fewer = self._resource_request.round_to_replicas(self._count - max(1, self._count // 8))
            self._count = max(self._resource_request.min_workers, fewer)
        self._requested = [dict(self._resource_request.worker_resources)] * self._count + [
            dict(amount) for amount in used
        ]
        request_resources(bundles=self._requested)
        return AutoscalerStatus(report.pending, report.failed, is_infeasible)

    def cancel_request(self) -> None:
        """Withdraw the request, if there was one: the cluster has a single request for all jobs."""
        if self._requested:
            with suppress(ray.exceptions.RayError):  # busy or dead head: the error that ended the run matters more
                request_resources(bundles=[])


class CapacityWaiter:
    """One wait for capacity."""

    def __init__(
        self, config: Config, resource_request: ResourceRequest, autoscaler: AutoscalerClient, console: Console
    ) -> None:
        self._resource_request, self._autoscaler, self._console = resource_request, autoscaler, console
        self._timeout = config.cluster.resource_timeout
        self._start_time = time.monotonic()
        self._last_report = float("-inf")

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._start_time

    def check_feasibility(self) -> None:
        """Check before data preparation that the run can ever be placed. Raises LaunchError if it cannot.

        The request is withdrawn at the end: nodes that the autoscaler adds would idle during the preparation.
        """
        try:
            while self.elapsed_seconds < _FEASIBILITY_TIMEOUT_SECONDS:
                alive = nodes.alive_nodes()
                if (
                    self._resource_request.count_fitting_workers(node.total for node in alive)
                    >= self._resource_request.min_workers
                ):
                    return
                status = self._autoscaler.request_capacity(compute_usage_by_others(alive, self._resource_request, {}))
                self._raise_if_infeasible(alive, status)
                self._report_waiting(alive, status)
                time.sleep(_POLL_SECONDS)
        finally:
            self._autoscaler.cancel_request()

    def poll_autoscaler(
        self, alive: Sequence[ClusterNode], schedulable: Sequence[ClusterNode], *, quietly: bool, nodes_may_return: bool
    ) -> None:
        """Request nodes and report the shortage; `schedulable` are the living nodes that the run may use.

        Raises LaunchError unless the run can be placed within `cluster.resource_timeout`.
        """
        status = self._autoscaler.request_capacity(compute_usage_by_others(alive, self._resource_request, {}))
        if not nodes_may_return:
            self._raise_if_infeasible(schedulable, status)
        if self.elapsed_seconds > (parse_duration_seconds(self._timeout) or 0.0):
            ending = (
                f"none came within cluster.resource_timeout = {self._timeout}; "
                "the same command resumes once there is room"
            )
            raise LaunchError(self._format_shortage(schedulable, f"; {ending}"))
        if not quietly:
            self._report_waiting(schedulable, status)

    def _report_waiting(self, schedulable: Sequence[ClusterNode], status: AutoscalerStatus | None) -> None:
        if time.monotonic() - self._last_report < _REPORT_INTERVAL_SECONDS:
            return
        self._last_report = time.monotonic()
        shortage = self._format_shortage(schedulable, f" (cluster.resource_timeout = {self._timeout})")
        self._console.print_line("\n".join([f"waiting for room: {shortage}", *format_autoscaler_status(status)]))

    def _raise_if_infeasible(self, schedulable: Sequence[ClusterNode], status: AutoscalerStatus | None) -> None:
        reason = self._find_infeasible_reason(schedulable, status)
        if reason:
            raise LaunchError(self._format_shortage(schedulable, f", and {reason}"))

    def _find_infeasible_reason(
        self, schedulable: Sequence[ClusterNode], status: AutoscalerStatus | None
    ) -> str | None:
        """Return why waiting is in vain and what to do; None if waiting may help."""
        most = self._resource_request.count_fitting_workers(node.total for node in schedulable)
        if most >= self._resource_request.min_workers or (status is not None and not status.is_infeasible):
            return None
        why = "its autoscaler can never add enough" if status else "no autoscaler (version 2) adds nodes to it"
        fewer = f"set cluster.workers to {most} (workers change the speed, not the result), " if most else ""
        return f"{why}: {fewer}ask for less of each worker, or make the cluster larger"

    def _format_shortage(self, schedulable: Sequence[ClusterNode], conclusion: str) -> str:
        """Format need and room in one line with `conclusion`, and the table below it."""
        room = self._resource_request.count_fitting_workers(node.free for node in schedulable)
        fewest = (
            f"{self._resource_request.min_workers} {'worker' if self._resource_request.min_workers == 1 else 'workers'}"
        )
        headline = f"the run needs {fewest}; the cluster has room for {room}{conclusion}"
        table = format_capacity_table(self._resource_request, schedulable, nodes.resource_usage_by_job())
        return "\n".join([headline, *table])


def format_capacity_table(
    resource_request: ResourceRequest, usable: Sequence[ClusterNode], usage_by_job: Mapping[str, Resources]
) -> list[str]:
    """Format need, nodes and use as a table with a column for each resource of a worker.

    `usage_by_job` holds the known part of the use.
    """
    names = sorted(resource_request.worker_resources, reverse=True)  # GPU before CPU
    kinds = Counter(tuple(node.total.get(name, 0.0) for name in names) for node in usable)
    used = {name: sum(node.total.get(name, 0.0) - node.free.get(name, 0.0) for node in usable) for name in names}
    rows = [
        ["", "count", *names],
        [
            f"each worker ({resource_request.placement})",
            str(resource_request.min_workers),
            *_format_amounts(resource_request.worker_resources, names),
        ],
        *(["each node", str(count), *(f"{amount:g}" for amount in kind)] for kind, count in kinds.most_common()),
        ["in use together", "", *_format_amounts(used, names)],
        *([f"  by {job}", "", *_format_amounts(usage, names)] for job, usage in usage_by_job.items()),
    ]
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {title:{first}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        for title, *cells in rows
    ]


def _format_amounts(resources: Resources, names: Iterable[str]) -> list[str]:
    return [f"{round(resources.get(name, 0.0), 4):g}" for name in names]


def format_autoscaler_status(status: AutoscalerStatus | None) -> list[str]:
    """Format the nodes that the autoscaler adds, and its newest failure; empty without an autoscaler."""
    if status is None:
        return []
    adding = ", ".join(f"{count} {kind}" for kind, count in sorted(status.adding.items()) if count)
    failures = [f"  autoscaler failed to start {status.failed[-1]}"] if status.failed else []
    return [f"  autoscaler is adding: {adding or 'nothing yet'}", *failures]
