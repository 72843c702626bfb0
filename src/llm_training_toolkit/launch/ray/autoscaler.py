"""The cluster's autoscaler, where there is one: what it is asked for, and what it says to that.

Ray has two. The second (`RAY_enable_autoscaler_v2=1`; KubeRay and `ray up` use it) reports to Ray's head and names
requests that it can never meet; the first leaves a JSON text there that tells of nodes on their way alone. Either also
works for a cluster that nothing can be added to: the first then calls each node a type of its own, the second refuses.
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

_STATUS_TIMEOUT_SECONDS = 10.0
"""Seconds Ray's head has to say what the autoscaler has told it."""
_DETECTION_TIMEOUT_SECONDS = 10.0
"""Seconds after which a cluster that knows of no autoscaler has none: they report every five."""
_STATIC_NODE_PREFIX = "node_"
"""How the first autoscaler names the type of a node in a cluster that it only watches."""


@dataclass(frozen=True)
class AutoscalerStatus:
    """What an autoscaler says."""

    adding: Mapping[str, int]
    """Nodes on their way, by type."""
    failed: tuple[str, ...] = ()
    """Starts of nodes that failed, in its words."""
    is_infeasible: bool = False
    """It can never make room for the fewest workers of the run."""


class AutoscalerClient:
    """What one run asks of the autoscaler beyond the workers it has."""

    def __init__(self, wanted: ResourceRequest) -> None:
        self._wanted, self._count = wanted, wanted.most
        self._asked: list[dict[str, float]] = []
        self._began = time.monotonic()

    def request_capacity(self, used: Iterable[Resources]) -> AutoscalerStatus | None:
        """Ask for the run's workers beside what others use; None where there is no autoscaler.

        To be repeated: Ray Train's own request replaces this one every 20 s. A request is met whole or not at all, so
        one that is refused is followed by one for fewer workers, down to the fewest.
        """
        said = _read_autoscaler_report()
        if said is None:  # a cluster that has just begun may have one that has not spoken yet
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
        """Ask for nothing any more, if anything was asked for: the request is one for the whole cluster."""
        if self._asked:
            with suppress(ray.exceptions.RayError):  # the head is busy or gone: what ended the run matters more
                request_resources(bundles=[])


BundleCounts = frozenset[tuple[frozenset[tuple[str, float]], int]]
"""Bundles and how many of each."""


def _count_bundles(bundles: Sequence[Mapping[str, float]]) -> BundleCounts:
    return frozenset(Counter(frozenset(bundle.items()) for bundle in bundles).items())


_AutoscalerReport = tuple[AutoscalerStatus | None, set[BundleCounts]]
"""What an autoscaler reports, None where it only watches; and the requests it can never meet."""


def _read_autoscaler_report() -> _AutoscalerReport | None:
    """What was said of nodes to be added; None where nobody has spoken."""
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
