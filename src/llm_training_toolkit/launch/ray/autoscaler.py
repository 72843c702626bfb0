"""Client of the cluster's autoscaler, if there is one: sends resource requests and reads its reports.

Ray has two autoscalers. Version 2 (`RAY_enable_autoscaler_v2=1`; used by KubeRay and `ray up`) reports to Ray's head
and names infeasible requests. Version 1 stores a JSON text there with pending and failed nodes only. Either also runs
on a static cluster: version 1 then gives every node a type of its own, version 2 reports requests as infeasible.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get

from llm_training_toolkit.launch.ray.resources import ResourceRequest, Resources

_STATUS_TIMEOUT_SECONDS = 10.0  # for Ray's head to reply
_DETECTION_TIMEOUT_SECONDS = 10.0  # autoscalers report every 5 s; without a report by then there is none
_STATIC_NODE_PREFIX = "node_"  # of the node types that version 1 makes up for a static cluster


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

    def __init__(self, wanted: ResourceRequest) -> None:
        self._wanted, self._count = wanted, wanted.most
        self._asked: list[dict[str, float]] = []
        self._began = time.monotonic()

    def request_capacity(self, used: Iterable[Resources]) -> AutoscalerStatus | None:
        """Request the run's workers on top of the resources `used` by others. Return None without an autoscaler.

        Repeat the call: Ray Train's own request replaces this one every 20 s. A request is met whole or not at all, so
        an infeasible one is followed by one for an eighth fewer workers, down to the fewest.
        """
        said = _read_autoscaler_report()
        if said is None:  # the autoscaler of a new cluster may not have reported yet
            return None if time.monotonic() - self._began > _DETECTION_TIMEOUT_SECONDS else AutoscalerStatus({})
        answer, refused = said
        if answer is None:
            return None
        is_refused = bool(self._asked) and _count_bundles(self._asked) in refused
        refuses = is_refused and self._count <= self._wanted.fewest
        if is_refused and not refuses:
            self._count = max(self._wanted.fewest, self._count - max(1, self._count // 8))
        self._asked = [dict(self._wanted.worker_resources)] * self._count + [dict(amount) for amount in used]
        request_resources(bundles=self._asked)
        return AutoscalerStatus(answer.adding, answer.failed, refuses)

    def cancel_request(self) -> None:
        """Withdraw the request, if there was one: the cluster has a single request for all jobs."""
        if self._asked:
            with suppress(ray.exceptions.RayError):  # busy or dead head: the error that ended the run matters more
                request_resources(bundles=[])


BundleCounts = frozenset[tuple[frozenset[tuple[str, float]], int]]  # bundles, and the number of each


def _count_bundles(bundles: Sequence[Mapping[str, float]]) -> BundleCounts:
    return frozenset(Counter(frozenset(bundle.items()) for bundle in bundles).items())


# The status, None for a static cluster; and the infeasible requests.
_AutoscalerReport = tuple[AutoscalerStatus | None, set[BundleCounts]]


def _read_autoscaler_report() -> _AutoscalerReport | None:
    """Return the newest report, None if there is none yet."""
    address = ray.get_runtime_context().gcs_address
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(address=address).get_cluster_status(timeout_s=_STATUS_TIMEOUT_SECONDS))
    if reply.autoscaling_state.autoscaler_state_version:
        return _parse_v2_state(reply.autoscaling_state)
    text = _internal_kv_get(DEBUG_AUTOSCALING_STATUS)
    return _parse_v1_status(json.loads(text)) if text and not is_autoscaler_v2() else None


def _parse_v2_state(state: AutoscalingState) -> _AutoscalerReport:
    adding: Counter[str] = Counter()
    for request in state.pending_instance_requests:
        adding[request.ray_node_type_name] += request.count
    adding.update(instance.ray_node_type_name for instance in state.pending_instances)
    failed = tuple(f"{request.ray_node_type_name}: {request.reason}" for request in state.failed_instance_requests)
    refused = {
        frozenset((frozenset(asked.request.resources_bundle.items()), asked.count) for asked in each.resource_requests)
        for each in state.infeasible_cluster_resource_constraints
    }
    return AutoscalerStatus(dict(adding), failed), refused


def _parse_v1_status(status: Mapping[str, Any]) -> _AutoscalerReport:
    report = status.get("autoscaler_report") or {}
    types = (report.get("node_type_mapping") or {}).values()
    if all(str(name).startswith(_STATIC_NODE_PREFIX) for name in types):
        return None, set()
    adding = Counter(report.get("pending_launches") or {})
    adding.update(str(kind) for _, kind, _ in report.get("pending_nodes") or [])
    failed = tuple(f"{kind}: node {address} failed" for address, kind in report.get("failed_nodes") or [])
    return AutoscalerStatus(dict(adding), failed), set()
