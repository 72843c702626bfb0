"""Every private name of Ray that the toolkit uses, each behind one function. Written for Ray 2.60.

An update of Ray may change private names without notice: `tests/unit/launch/ray/test_private_api.py` checks each
against the installed Ray and names what has changed. Each docstring says why the public interface does not suffice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray._private import state
from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.autoscaler_pb2 import DrainNodeReason, GetClusterStatusReply
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.job_config import JobConfig
from ray.util.placement_group import PlacementGroup, remove_placement_group

from llm_training_toolkit.errors import LaunchError

_STATUS_TIMEOUT_SECONDS = 10.0  # for Ray's head to reply

HEAD_RESOURCE = HEAD_NODE_RESOURCE_NAME  # of the head alone; an actor with a sliver of it reserves no CPU
MAX_PACKAGE_BYTES: int = DASHBOARD_CLIENT_MAX_SIZE  # the job server answers a larger package with a traceback
# Loggers of a job submission, named after their modules: Ray has no option to silence them.
JOB_CLIENT_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env",
)
ActorDeath = tuple[Literal["killed", "oom", "node_lost"], str]  # kind of a silent death, Ray's text


class PlacementGroupUse(NamedTuple):
    """Resources that a placement group holds."""

    job: str
    """Id of the job that created it."""
    bundles: Sequence[Mapping[str, float]]


BundleCounts = frozenset[tuple[frozenset[tuple[str, float]], int]]  # bundles, and the number of each


class AutoscalerReport(NamedTuple):
    """Report of autoscaler v2."""

    pending: Mapping[str, int]
    """Number of nodes that it adds, by type."""
    failed: tuple[str, ...]
    """Failed node launches, as `type: reason`."""
    infeasible: set[BundleCounts]
    """Requests that it can never meet."""


class InstalledCodeConfig(JobConfig):
    """Job whose workers import installed modules alone.

    Ray puts the driver's current folder before everything else on the workers' path, without an option against it. A
    file such as queue.py, in a folder of code to train on, would be imported in place of Python's own.
    """

    def _runtime_env_has_working_dir(self) -> bool:
        """Return True, which makes Ray add no folder of the driver to the path."""
        return True


def read_free_resources() -> dict[str, dict[str, float]]:
    """Return the free resources by node id. The public `ray.available_resources` has their sum alone."""
    free: dict[str, dict[str, float]] = state.available_resources_per_node()
    return free


def read_draining_nodes() -> dict[str, int]:
    """Return the draining nodes: deadline in milliseconds since 1970 by node id, 0 = not given. Nothing public."""
    deadlines: dict[str, int] = state.state.get_draining_nodes()
    return deadlines


def drain_node(address: str, node: str, deadline: int) -> None:
    """Drain a node as a preemption notice does; `deadline` is in milliseconds since 1970.

    Public is the command `ray drain-node` alone, which starts a process. Raises LaunchError if Ray refuses.
    """
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    is_accepted, why = GcsClient(address=address).drain_node(node, reason, "preempted", deadline)
    if not is_accepted:
        raise LaunchError(f"Ray does not drain node {node}: {why}")


def read_placement_groups() -> list[PlacementGroupUse]:
    """Return the created placement groups. The public `ray.util.placement_group_table` does not name their jobs."""
    accessor = state.state._connect_and_get_accessor()  # noqa: SLF001
    groups = [PlacementGroupTableData.FromString(serialized) for serialized in accessor.get_placement_group_table()]
    return [
        PlacementGroupUse(group.creator_job_id.hex(), [dict(bundle.unit_resources) for bundle in group.bundles])
        for group in groups
        if group.state == PlacementGroupTableData.CREATED
    ]


def remove_placement_group_by_id(group: str) -> None:
    """Remove a placement group. The public functions take one that this process created, or its name."""
    remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def read_job_commands() -> dict[str, str]:
    """Return the commands by job id. The public `ray.util.state.list_jobs` needs a dashboard."""
    return {job["JobID"]: job["Entrypoint"] for job in state.jobs()}


def read_actor_death(actor: str) -> ActorDeath | None:
    """Return the cause if an actor's process died on its own, None if it lives or was killed on request.

    The public `ray.util.state.get_actor` needs a dashboard.
    """
    record = state.state.actor_table(actor)
    if record.get("State") != "DEAD":
        return None
    cause = record["DeathCause"]
    if cause.WhichOneof("context") == "oom_context":
        return "oom", str(cause.oom_context.error_message)
    context = cause.actor_died_error_context
    reason = context.Reason.Name(context.reason)
    kinds: dict[str, Literal["killed", "node_lost"]] = {"NODE_DIED": "node_lost", "WORKER_DIED": "killed"}
    return (kinds[reason], str(context.error_message)) if reason in kinds else None


def has_autoscaler_v2() -> bool:
    """Return whether the head runs autoscaler v2, which alone reports its decisions to the head. Nothing public."""
    return bool(is_autoscaler_v2())


def read_autoscaler_report() -> AutoscalerReport | None:
    """Return the newest report of autoscaler v2, None before the first. Public is the text of `ray status` alone."""
    client, reply = GcsClient(address=ray.get_runtime_context().gcs_address), GetClusterStatusReply()
    reply.ParseFromString(client.get_cluster_status(timeout_s=_STATUS_TIMEOUT_SECONDS))
    report = reply.autoscaling_state
    if not report.autoscaler_state_version:
        return None
    pending = Counter(instance.ray_node_type_name for instance in report.pending_instances)
    for request in report.pending_instance_requests:
        pending[request.ray_node_type_name] += request.count
    failed = tuple(f"{request.ray_node_type_name}: {request.reason}" for request in report.failed_instance_requests)
    infeasible = {
        frozenset((frozenset(each.request.resources_bundle.items()), each.count) for each in refused.resource_requests)
        for refused in report.infeasible_cluster_resource_constraints
    }
    return AutoscalerReport(dict(pending), failed, infeasible)


def count_bundles(bundles: Sequence[Mapping[str, float]]) -> BundleCounts:
    """Return a request in the form of `AutoscalerReport.infeasible`."""
    return frozenset(Counter(frozenset(bundle.items()) for bundle in bundles).items())


def get_server_ray_version(client: Any) -> str:  # noqa: ANN401 - Ray has no types
    """Return the cluster's Ray version, which a job client reads when it connects. Public is the client's alone."""
    return str(client._server_ray_version)  # noqa: SLF001


def visit_packaged_paths(folder: Path, excludes: list[str], visit: Callable[[Path], None]) -> None:
    """Call `visit` for each path of a job's package, by Ray's own walk, which counts what it packs. Nothing public."""
    _dir_travel(folder, [_get_excludes(folder, excludes)], visit, include_gitignore=True)
