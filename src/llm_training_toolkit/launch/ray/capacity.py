"""Wait for cluster capacity: the shortage is reported at once and every 30 s; a hopeless wait raises LaunchError."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from llm_training_toolkit.config import Config
from llm_training_toolkit.config.schema import parse_duration_seconds
from llm_training_toolkit.errors import LaunchError
from llm_training_toolkit.launch.ray import nodes
from llm_training_toolkit.launch.ray.autoscaler import AutoscalerClient, AutoscalerStatus
from llm_training_toolkit.launch.ray.resources import ClusterNode, ResourceRequest, Resources, compute_usage_by_others
from llm_training_toolkit.monitoring.console import Console

_REPORT_INTERVAL_SECONDS = 30.0
# For the autoscaler to report infeasibility: it reports every 5 s, and two requests for fewer workers may follow.
_FEASIBILITY_TIMEOUT_SECONDS = 20.0
_POLL_SECONDS = 0.5
_RESOURCE_ORDER = ("GPU", "CPU")  # in messages; the others follow by name
_PLACEMENT_PHRASES = {"strict_pack": " on one node", "strict_spread": " on as many nodes"}


class CapacityWaiter:
    """One wait for capacity."""

    def __init__(self, config: Config, wanted: ResourceRequest, autoscaler: AutoscalerClient, console: Console) -> None:
        self._wanted, self._autoscaler, self._console = wanted, autoscaler, console
        self._wait = config.cluster.resource_timeout
        self._began = time.monotonic()
        self._said = float("-inf")

    @property
    def elapsed_seconds(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._began

    def check_feasibility(self) -> None:
        """Check before data preparation that the run can ever be placed. Raises LaunchError if it cannot.

        The request is withdrawn at the end: nodes that the autoscaler adds would idle during the preparation.
        """
        try:
            while self.elapsed_seconds < _FEASIBILITY_TIMEOUT_SECONDS:
                living = nodes.alive_nodes()
                if self._wanted.count_fitting_workers(node.total for node in living) >= self._wanted.fewest:
                    return
                answer = self._autoscaler.request_capacity(compute_usage_by_others(living, self._wanted, {}))
                self._raise_if_infeasible(living, answer)
                self._report_waiting(living, answer)
                time.sleep(_POLL_SECONDS)
        finally:
            self._autoscaler.cancel_request()

    def poll_autoscaler(
        self, living: Sequence[ClusterNode], good: Sequence[ClusterNode], *, quietly: bool, nodes_may_return: bool
    ) -> None:
        """Request nodes and report the shortage; `good` are the living nodes that the run may use.

        Raises LaunchError if the run can never be placed, or not within `cluster.resource_timeout`.
        """
        answer = self._autoscaler.request_capacity(compute_usage_by_others(living, self._wanted, {}))
        if not nodes_may_return:
            self._raise_if_infeasible(good, answer)
        if self.elapsed_seconds > (parse_duration_seconds(self._wait) or 0.0):
            ending = (
                f"none came within cluster.resource_timeout = {self._wait}; the same command goes on once there is room"
            )
            raise LaunchError(f"{self._format_shortage(good)}; {ending}")
        if not quietly:
            self._report_waiting(good, answer)

    def _report_waiting(self, good: Sequence[ClusterNode], answer: AutoscalerStatus | None) -> None:
        if time.monotonic() - self._said < _REPORT_INTERVAL_SECONDS:
            return
        self._said = time.monotonic()
        adding = f"; {format_pending_nodes(answer.adding, answer.failed)}" if answer else ""
        self._console.print_line(
            f"waiting for room: {self._format_shortage(good)}{adding} (cluster.resource_timeout = {self._wait})"
        )

    def _format_shortage(self, good: Sequence[ClusterNode]) -> str:
        return format_shortage(self._wanted, good, nodes.resource_usage_by_job())

    def _raise_if_infeasible(self, good: Sequence[ClusterNode], answer: AutoscalerStatus | None) -> None:
        never = self._find_infeasible_reason(good, answer)
        if never:
            raise LaunchError(f"{self._format_shortage(good)}, and {never}")

    def _find_infeasible_reason(self, good: Sequence[ClusterNode], answer: AutoscalerStatus | None) -> str:
        """Return why waiting is in vain and what to do, "" if waiting may help."""
        could = self._wanted.count_fitting_workers(node.total for node in good)
        if could >= self._wanted.fewest or (answer is not None and not answer.is_infeasible):
            return ""
        why = "its autoscaler can never add enough" if answer else "no autoscaler adds nodes to it"
        lower = f"set cluster.workers to {could} (workers change the speed, not the result), " if could else ""
        return f"{why}: {lower}ask for less of each worker, or make the cluster larger"


def format_shortage(wanted: ResourceRequest, usable: Sequence[ClusterNode], uses: Mapping[str, Resources]) -> str:
    """Format the run's need, the cluster's capacity and its use by job (`uses`, as far as known)."""
    now = wanted.count_fitting_workers(node.free for node in usable)
    needs = (
        f"{format_plural(wanted.fewest, 'worker')} of "
        f"{format_resources(wanted.worker_resources)}{_PLACEMENT_PHRASES.get(wanted.placement, '')}"
    )
    there = (
        f"{_format_node_resources(usable, wanted.worker_resources)}, "
        f"{_format_usage_by_job(_sum_used_resources(usable, wanted.worker_resources), uses)}"
    )
    return f"the run needs {needs}; the cluster has room for {now}: {there}"


def format_pending_nodes(adding: Mapping[str, int], failed: Sequence[str]) -> str:
    """Format the autoscaler's pending and failed nodes."""
    coming = [f"{format_plural(number, 'node')} of type {kind}" for kind, number in sorted(adding.items()) if number]
    said = f"its autoscaler is adding {_join_with_and(coming)}" if coming else "its autoscaler adds no node yet"
    return f"{said}; it failed to start {failed[-1]}" if failed else said


def format_resources(resources: Resources) -> str:
    """Format resources as `1 GPU and 8 CPU`, omitting zero amounts."""
    parts = [f"{resources[name]:g} {name}" for name in _sort_resource_names(resources) if resources[name]]
    return _join_with_and(parts) or "nothing"


def format_plural(number: int, what: str) -> str:
    """Format a count: `1 node`, `3 nodes`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sum_used_resources(nodes: Sequence[ClusterNode], names: Iterable[str]) -> dict[str, float]:
    """Return the used amounts of the named resources, summed over the nodes."""
    used = {name: sum(node.total.get(name, 0.0) - node.free.get(name, 0.0) for node in nodes) for name in names}
    return {name: round(amount, 4) for name, amount in used.items() if round(amount, 4) > 0}


def _format_node_resources(nodes: Sequence[ClusterNode], names: Iterable[str]) -> str:
    names = list(names)
    kinds = Counter(format_resources({name: node.total.get(name, 0.0) for name in names}) for node in nodes)
    having = [(kind, number) for kind, number in kinds.most_common() if kind != "nothing"]
    if not having:
        return f"no node has {_join_with_and(_sort_resource_names(names))}"
    return _join_with_and([f"{format_plural(number, 'node')} with {kind}" for kind, number in having])


def _format_usage_by_job(used: Resources, uses: Mapping[str, Resources]) -> str:
    """Format as `2 GPU in use (2 GPU by ltt train a.yaml)`."""
    if not used:
        return "none of it in use"
    by = [f"{format_resources({name: use.get(name, 0.0) for name in used})} by {job}" for job, use in uses.items()]
    return f"{format_resources(used)} in use" + (f" ({_join_with_and(by)})" if by else "")


def _sort_resource_names(names: Iterable[str]) -> list[str]:
    return sorted(
        names, key=lambda name: (_RESOURCE_ORDER.index(name) if name in _RESOURCE_ORDER else len(_RESOURCE_ORDER), name)
    )


def _join_with_and(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
