"""Placement arithmetic: how many workers fit on a cluster's nodes. Pure; `nodes.py` asks Ray for the nodes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from llm_training_toolkit.config import Config
from llm_training_toolkit.monitoring.console import Console


def build_resource_request(config: Config, gpus_there: float, console: Console) -> ResourceRequest:
    """Return the workers to request on a cluster with `gpus_there` GPUs; print a note if those stay unused."""
    cluster_config = config.cluster
    if cluster_config.gpus_per_worker == "auto" and 0 < gpus_there < cluster_config.min_workers:
        console.print_line(
            f"note: {gpus_there:g} GPUs for {cluster_config.min_workers} workers: training on CPU; "
            f"cluster.workers={gpus_there:g} "
            "uses them, cluster.gpus_per_worker=1 waits for more"
        )
    return ResourceRequest(
        cluster_config.min_workers,
        cluster_config.max_workers,
        compute_worker_resources(config, gpus_there),
        cluster_config.placement_strategy,
        config.engine.ranks_per_replica,
    )


def compute_worker_resources(config: Config, gpus_there: float) -> dict[str, float]:
    """Return the resources of one worker on a cluster with `gpus_there` GPUs."""
    gpus = config.cluster.gpus_per_worker
    if gpus == "auto":
        gpus = 1 if gpus_there >= config.cluster.min_workers else 0
    return {"CPU": float(config.cluster.cpus_per_worker)} | ({"GPU": float(gpus)} if gpus else {})


Resources = Mapping[str, float]


@dataclass(frozen=True)
class ClusterNode:
    """Node of the cluster, as Ray reports it."""

    id: str
    """Node id, new at every start of the node."""
    address: str
    port: int
    """Port of the node's Ray process."""
    total: Resources
    free: Resources
    is_draining: bool = False
    """True if Ray was told that the node will be preempted."""


@dataclass(frozen=True)
class ResourceRequest:
    """Workers that a run requests."""

    min_workers: int
    max_workers: int
    worker_resources: Resources
    """Resources of one worker."""
    placement: str
    """`cluster.placement_strategy`."""
    multiple: int = 1
    """Workers of a replica, `engine.sequence_parallel` or `engine.tensor_parallel`: a group has whole replicas."""

    def round_to_replicas(self, workers: int) -> int:
        """Return the workers of the whole replicas among so many."""
        return workers // self.multiple * self.multiple

    def count_fitting_workers(self, nodes: Iterable[Resources]) -> int:
        """Count the workers of whole replicas that fit into the nodes' resources, at most `max_workers`."""
        fitting = [_count_worker_slots(resources, self.worker_resources) for resources in nodes]
        if self.placement == "strict_pack":
            count = max(fitting, default=0)
        elif self.placement == "strict_spread":
            count = sum(map(bool, fitting))
        else:
            count = sum(fitting)
        return self.round_to_replicas(min(count, self.max_workers))


def has_room_for_worker(resources: Resources, each: Resources) -> bool:
    """Return whether a node with `resources` can hold a worker."""
    return _count_worker_slots(resources, each) > 0


def _count_worker_slots(resources: Resources, each: Resources) -> int:
    """Count the workers that fit into one node; Ray counts resources in ten-thousandths."""
    return min(int((resources.get(name, 0.0) + 1e-4) // amount) for name, amount in each.items() if amount)


def schedulable_nodes(
    nodes: Sequence[ClusterNode], request: ResourceRequest, excluded: Collection[str]
) -> list[ClusterNode]:
    """Return the nodes in service, minus the addresses in `excluded` if the fewest workers fit without those."""
    staying = [node for node in nodes if not node.is_draining]
    trusted = [node for node in staying if node.address not in excluded]
    return trusted if request.count_fitting_workers(node.total for node in trusted) >= request.min_workers else staying


def count_fitting_after_drain(nodes: Iterable[ClusterNode], request: ResourceRequest, own: Mapping[str, int]) -> int:
    """Count the workers that would fit if the run's present ones drained; `own` counts those by node id."""
    return request.count_fitting_workers(
        _add_own_resources(node, request.worker_resources, own.get(node.id, 0)) for node in nodes
    )


def compute_usage_by_others(
    nodes: Iterable[ClusterNode], request: ResourceRequest, own: Mapping[str, int]
) -> list[Resources]:
    """Return the use of a worker's resources on each node, without the run's own workers (`own`: count by node id)."""
    found = []
    for node in nodes:
        free = _add_own_resources(node, request.worker_resources, own.get(node.id, 0))
        used = {name: round(node.total.get(name, 0.0) - amount, 4) for name, amount in free.items()}
        found.append({name: amount for name, amount in used.items() if amount > 0})
    return [used for used in found if used]


def _add_own_resources(node: ClusterNode, each: Resources, count: int) -> Resources:
    return {name: node.free.get(name, 0.0) + count * amount for name, amount in each.items()}


def count_concurrent_runs(nodes: Iterable[Resources], request: ResourceRequest) -> int:
    """Count the runs of `request.min_workers` workers each that fit on the nodes at a time."""
    fitting = [_count_worker_slots(resources, request.worker_resources) for resources in nodes]
    if request.placement == "strict_pack":
        return sum(count // request.min_workers for count in fitting)
    if request.placement == "strict_spread":  # a node holds one worker of each run: k runs if they can be dealt out
        counts = range(sum(fitting) // request.min_workers, 0, -1)
        return next((k for k in counts if sum(min(fit, k) for fit in fitting) >= k * request.min_workers), 0)
    return sum(fitting) // request.min_workers
