"""Scaling policy: when an elastic run below its largest size drains to restart with more workers. Pure.

Growing costs a restart (about 30 s) but no step, since the ranks save before they exit. So it waits for the next due
checkpoint or until five minutes after the group began, whichever is first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from llm_training_toolkit.distributed.context import StopRequest
from llm_training_toolkit.launch.ray.resources import (
    ClusterNode,
    ResourceRequest,
    count_fitting_after_drain,
    schedulable_nodes,
)

_POLL_SECONDS = 3.0
_STABLE_SECONDS = 5.0  # room must last: a node that just joined or a job that just ended may be between two things
_MAX_DELAY_SECONDS = 300.0  # after its first check, a group saves out of turn and drains


@dataclass
class ElasticScalingPolicy:
    """Scaling policy of one worker group."""

    resource_request: ResourceRequest
    size: int
    excluded_nodes: Collection[str]
    """Addresses that do not count as room."""
    _first_check: float | None = None
    _last_check: float = float("-inf")
    _room_since: float | None = None

    def is_check_due(self, now: float) -> bool:
        """Return whether to check for room now."""
        if self.size >= self.resource_request.max_workers or now - self._last_check < _POLL_SECONDS:
            return False
        self._last_check = now
        self._first_check = now if self._first_check is None else self._first_check
        return True

    def decide_drain(self, nodes: Sequence[ClusterNode], own: Mapping[str, int], now: float) -> StopRequest:
        """Return the request to the ranks; `own` counts them by node id."""
        room = count_fitting_after_drain(
            schedulable_nodes(nodes, self.resource_request, self.excluded_nodes), self.resource_request, own
        )
        if room <= self.size:
            self._room_since = None
            return StopRequest.NONE
        self._room_since = now if self._room_since is None else self._room_since
        if now - self._room_since < _STABLE_SECONDS or self._first_check is None:
            return StopRequest.NONE
        return (
            StopRequest.DRAIN if now - self._first_check >= _MAX_DELAY_SECONDS else StopRequest.DRAIN_AFTER_CHECKPOINT
        )
