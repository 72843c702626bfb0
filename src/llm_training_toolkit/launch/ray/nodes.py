"""Nodes of the Ray cluster: resources, reachability, draining and causes of worker deaths.

Ray 2.60's public interface has total resources only. Free resources, draining nodes and causes of actor deaths come
from the internals that Ray Train and Ray Data read.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import ray
from ray._private import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group

from llm_training_toolkit.launch.ray.resources import ClusterNode

_CONNECT_TIMEOUT_SECONDS = 2.0  # to a node's Ray process
_MAX_COMMAND_LENGTH = 60  # characters shown of another job's command
_NODE_ID_LABEL = "ray.io/node-id"
ActorDeath = tuple[Literal["killed", "oom", "node_lost"], str]  # kind of a silent death, Ray's text


def alive_nodes() -> list[ClusterNode]:
    """Return the nodes that Ray considers alive, sorted by address. Ray notices a silent loss after about 30 s."""
    free, drained = state.available_resources_per_node(), state.state.get_draining_nodes()
    nodes = [
        ClusterNode(
            id=node["NodeID"],
            address=node["NodeManagerAddress"],
            port=int(node["NodeManagerPort"]),
            total=node["Resources"],
            free=free.get(node["NodeID"], {}),
            is_draining=node["NodeID"] in drained,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.address, node.id))


def reachable_nodes(nodes: Sequence[ClusterNode]) -> list[ClusterNode]:
    """Return the nodes whose Ray process accepts a connection now."""
    with ThreadPoolExecutor(max_workers=min(32, max(1, len(nodes)))) as pool:
        return [node for node, answers in zip(nodes, pool.map(_is_node_reachable, nodes), strict=True) if answers]


def _is_node_reachable(node: ClusterNode) -> bool:
    try:
        with socket.create_connection((node.address, node.port), timeout=_CONNECT_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def draining_nodes(ids: Iterable[str]) -> dict[str, int]:
    """Return the draining nodes among `ids`, with their deadline (milliseconds since 1970, 0 = not given)."""
    drained = state.state.get_draining_nodes()
    return {node: int(drained[node]) for node in ids if node in drained}


def build_exclusion_selector(nodes: Iterable[ClusterNode]) -> dict[str, str] | None:
    """Return the label selector that keeps workers off these nodes, None for no nodes."""
    ids = sorted(node.id for node in nodes)
    return {_NODE_ID_LABEL: f"!in({','.join(ids)})"} if ids else None


def resource_usage_by_job() -> dict[str, dict[str, float]]:
    """Return the resources of other jobs' placement groups, by job (command, id), without single tasks and actors."""
    commands = {job["JobID"]: job["Entrypoint"] for job in state.jobs()}
    own = ray.get_runtime_context().get_job_id()
    found: dict[str, Counter[str]] = {}
    for serialized in state.state._connect_and_get_accessor().get_placement_group_table():  # noqa: SLF001
        group = PlacementGroupTableData.FromString(serialized)
        job = group.creator_job_id.hex()
        if group.state == PlacementGroupTableData.CREATED and job != own:
            using = found.setdefault(f"`{_shorten_command(commands.get(job, ''))}` (job {job})", Counter())
            for bundle in group.bundles:
                using.update(bundle.unit_resources)
    return {job: dict(using) for job, using in found.items()}


def _shorten_command(command: str) -> str:
    """Return the end of a command, its distinctive part, on one line."""
    command = " ".join(command.split())
    return command if len(command) <= _MAX_COMMAND_LENGTH else f"...{command[-_MAX_COMMAND_LENGTH:]}"


def release_placement_groups(places: Iterable[str]) -> None:
    """Remove placement groups: Ray Train's own clean-up needs a dashboard if its controller was killed."""
    for group in places:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def dead_actors(actors: Mapping[int, str]) -> dict[int, ActorDeath]:
    """Return the ranks whose process died on its own, from their actor ids, without those that Ray Train killed."""
    found = {rank: _parse_actor_death(state.state.actor_table(actor)) for rank, actor in actors.items()}
    return {rank: death for rank, death in found.items() if death}


def _parse_actor_death(actor: Mapping[str, Any]) -> ActorDeath | None:
    if actor.get("State") != "DEAD":
        return None
    cause = actor["DeathCause"]
    if cause.WhichOneof("context") == "oom_context":
        return "oom", str(cause.oom_context.error_message)
    context = cause.actor_died_error_context
    reason = context.Reason.Name(context.reason)
    if reason == "NODE_DIED":
        return "node_lost", str(context.error_message)
    if reason == "WORKER_DIED":
        return "killed", str(context.error_message)
    return None
