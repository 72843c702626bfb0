"""Nodes of the Ray cluster: resources, reachability, draining and causes of worker deaths."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import ray

from llm_training_toolkit.launch.ray import private_api
from llm_training_toolkit.launch.ray.resources import ClusterNode

_CONNECT_TIMEOUT_SECONDS = 2.0  # to a node's Ray process
_MAX_COMMAND_LENGTH = 60  # characters shown of another job's command
_NODE_ID_LABEL = "ray.io/node-id"


def alive_nodes() -> list[ClusterNode]:
    """Return the nodes that Ray considers alive, sorted by address. Ray notices a silent loss after about 30 s."""
    free, drained = private_api.read_free_resources(), private_api.read_draining_nodes()
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
    drained = private_api.read_draining_nodes()
    return {node: drained[node] for node in ids if node in drained}


def build_exclusion_selector(nodes: Iterable[ClusterNode]) -> dict[str, str] | None:
    """Return the label selector that keeps workers off these nodes, None for no nodes."""
    ids = sorted(node.id for node in nodes)
    return {_NODE_ID_LABEL: f"!in({','.join(ids)})"} if ids else None


def resource_usage_by_job() -> dict[str, dict[str, float]]:
    """Return the resources of other jobs' placement groups, by job (command, id), without single tasks and actors."""
    commands, own = private_api.read_job_commands(), ray.get_runtime_context().get_job_id()
    usage: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for group in private_api.read_placement_groups():
        if group.job == own:
            continue
        held = usage[f"`{_shorten_command(commands.get(group.job, ''))}` (job {group.job})"]
        for bundle in group.bundles:
            for name, amount in bundle.items():
                held[name] = held.get(name, 0.0) + amount
    return dict(usage)


def _shorten_command(command: str) -> str:
    """Return the end of a command, its distinctive part, on one line."""
    command = " ".join(command.split())
    return command if len(command) <= _MAX_COMMAND_LENGTH else f"...{command[-_MAX_COMMAND_LENGTH:]}"


def release_placement_groups(groups: Iterable[str]) -> None:
    """Remove placement groups: Ray Train's own clean-up needs a dashboard if its controller was killed."""
    for group in groups:
        private_api.remove_placement_group_by_id(group)


def dead_actors(actors: Mapping[int, str]) -> dict[int, private_api.ActorDeath]:
    """Return the ranks whose process died on its own, from their actor ids, without those that Ray Train killed."""
    found = {rank: private_api.read_actor_death(actor) for rank, actor in actors.items()}
    return {rank: death for rank, death in found.items() if death}
