"""What is said of a run that has no room; pure."""

from __future__ import annotations

from llm_training_toolkit.launch.ray.capacity import format_pending_nodes, format_shortage
from llm_training_toolkit.launch.ray.resources import ClusterNode, ResourceRequest, Resources, compute_usage_by_others

GPU_WORKER = {"GPU": 1.0, "CPU": 8.0}


def node(number: int, total: Resources, free: Resources) -> ClusterNode:
    return ClusterNode(id=str(number), address=f"10.0.0.{number}", port=1, total=total, free=free)


def test_what_is_used_and_by_whom_is_said() -> None:
    full = {"GPU": 4.0, "CPU": 64.0}
    nodes = [node(1, full, {"GPU": 2.0, "CPU": 48.0}), node(2, full, full)]
    said = format_shortage(
        ResourceRequest(8, 8, GPU_WORKER, "pack"), nodes, {"`ltt train a.yaml` (job 02)": {"GPU": 2.0, "CPU": 16.0}}
    )
    assert said == (
        "the run needs 8 workers of 1 GPU and 8 CPU; the cluster has room for 6: 2 nodes with 4 GPU and 64 CPU, "
        "2 GPU and 16 CPU in use (2 GPU and 16 CPU by `ltt train a.yaml` (job 02))"
    )


def test_a_cluster_without_what_a_worker_needs() -> None:
    said = format_shortage(ResourceRequest(1, 2, GPU_WORKER, "strict_pack"), [], {})
    assert said == (
        "the run needs 1 worker of 1 GPU and 8 CPU on one node; the cluster has room for 0: no node has GPU and CPU, "
        "none of it in use"
    )


def test_what_an_autoscaler_is_about() -> None:
    assert format_pending_nodes({"gpu": 1, "cpu": 2}, ()) == (
        "its autoscaler is adding 2 nodes of type cpu and 1 node of type gpu"
    )
    assert format_pending_nodes({}, ("gpu: no capacity",)) == (
        "its autoscaler adds no node yet; it failed to start gpu: no capacity"
    )


def test_what_others_use_leaves_out_the_own_workers() -> None:
    nodes = [
        node(1, {"CPU": 4.0}, {"CPU": 1.0}),
        node(2, {"CPU": 4.0}, {"CPU": 2.0}),
        node(3, {"GPU": 1.0}, {"GPU": 1.0}),
    ]
    assert compute_usage_by_others(nodes, ResourceRequest(1, 4, {"CPU": 1.0}, "pack"), {"1": 1, "2": 2}) == [
        {"CPU": 2.0}
    ]
